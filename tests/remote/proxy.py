"""A TCP proxy between client and server that can lose, cut and delay connections."""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tests.remote.server import free_port

BLOCK = 1 << 14  # bytes


@dataclass(eq=False)
class Line:
    """One connection: the client's end and the server's, and whether it still passes data."""

    client: socket.socket
    server: socket.socket
    lost: bool = False
    room: int | None = None  # bytes from the client until it is reset
    ended: threading.Event = field(default_factory=threading.Event)

    def end(self) -> None:
        """Reset both ends (RST), as a restarted router does."""
        self.ended.set()
        for end in (self.client, self.server):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Forwards every connection to its `port` to another port.

        proxy.silence()       no data passes, and no end notices; it arrives after speak()
        proxy.lose()          open connections stay silent; new ones are not affected
        proxy.cut()           open connections are reset
        proxy.room = 5000     each new connection is reset after so many bytes from the client
        proxy.delay = 0.05    seconds for each block

    `count` is how many connections there were, `sent` how many bytes the last one's client has sent.
    """

    def __init__(self, to: int) -> None:
        self.to, self.port = to, free_port()
        self.count, self.sent = 0, 0
        self.delay, self.room = 0.0, None
        self.lines: list[Line] = []
        self._flowing, self._over = threading.Event(), threading.Event()
        self._flowing.set()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=100)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def silence(self) -> None:
        self._flowing.clear()

    def speak(self) -> None:
        self._flowing.set()

    def lose(self) -> None:
        for line in self.lines:
            line.lost = True

    def cut(self) -> None:
        for line in self.lines:
            line.end()

    def close(self) -> None:
        self._over.set()
        self._flowing.set()
        self.cut()
        for thread in self._threads:
            thread.join(timeout=10)
        self._listener.close()

    def _accept(self) -> None:
        while not self._over.is_set():
            if not select.select([self._listener], [], [], 0.05)[0]:
                continue
            client = self._listener.accept()[0]
            try:
                server = socket.create_connection(("127.0.0.1", self.to), timeout=10)
            except OSError:  # refuse it, as the server's own port would
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.count, self.sent = self.count + 1, 0
            line = Line(client, server, room=self.room)
            self.lines.append(line)
            self._threads.append(threading.Thread(target=self._carry, args=(line,), daemon=True))
            self._threads[-1].start()

    def _carry(self, line: Line) -> None:
        """Forward data in both directions until one end closes."""
        try:
            while not line.ended.is_set():
                ready = select.select([line.client, line.server], [], [], 0.05)[0]
                for one in ready:
                    data = one.recv(BLOCK)
                    if not data:
                        return
                    self._pass_on(line, one, data)
        except (OSError, ValueError):
            pass
        finally:
            line.end()
            line.client.close()
            line.server.close()
            self.lines.remove(line)

    def _pass_on(self, line: Line, one: socket.socket, data: bytes) -> None:
        if self.delay:
            self._over.wait(self.delay)
        while not self._flowing.wait(0.05) and not line.ended.is_set():
            pass
        if line.lost:
            return
        if one is line.server:
            line.client.sendall(data)
            return
        if line.room is not None:
            data, line.room = data[: line.room], line.room - len(data)
        self.sent += len(data)
        line.server.sendall(data)
        if line.room is not None and line.room <= 0:
            line.end()


@contextmanager
def proxy(to: int) -> Iterator[Proxy]:
    """A proxy in front of a port of this machine."""
    opened = Proxy(to)
    try:
        yield opened
    finally:
        opened.close()
