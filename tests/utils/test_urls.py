"""What is secret in a URL is hidden wherever the URL is: alone, in a word of a command line, in a sentence."""

from __future__ import annotations

import random
import time

import pytest

from src.utils.urls import hide_in_urls, is_redacted

HIDDEN = {
    "https://host/a.jsonl?X-Amz-Signature=9f&se=60": "https://host/a.jsonl?X-Amz-Signature=***&se=***",
    "https://me:word@host:8443/a": "https://***@host:8443/a",
    "https://token@host/a": "https://***@host/a",
    "postgres://me:wo/r?d@host/base": "postgres://***@host/base",
    "s3://KEY:SECRET@bucket/prefix": "s3://***@bucket/prefix",
    "https://host/a?9f3c": "https://host/a?***",
    "https://host/#access_token=9f": "https://host/#access_token=***",
    "https://proxy/https://me:word@host/a": "https://proxy/https://***@host/a",
    "+data_source.url=https://host/a?q='\"}&sig=9f": "+data_source.url=https://host/a?q=***&sig=***",
    "datasets=[{url:'https://me:w@h/a?b=c'}, {url: 'http://h/?d=e'}]":
        "datasets=[{url:'https://***@h/a?b=***'}, {url: 'http://h/?d=***'}]",
    "https://host/a.jsonl;session=9f;v=1": "https://host/a.jsonl;session=***;v=***",
    "'https://host/a?b=it's9f#t=7' does not exist": "'https://host/a?b=***#t=***' does not exist",
    "no answer (https://host/a?sig=9f); try again": "no answer (https://host/a?sig=***); try again",
    "Max retries exceeded with url: /a?sig=9f (Caused by X)":
        "Max retries exceeded with url: /a?sig=*** (Caused by X)",
    "https://host/a?sig=${oc.env:SIG}&id=1": "https://host/a?sig=${oc.env:SIG}&id=***",
}  # fmt: skip
PLAIN = [
    "https://host/a.jsonl", "http://host:8080/a@b", "https://host/page#chapter", "s3://bucket/part-?.jsonl",
    "data/part-?.jsonl", "a?b=c", "mail me@host", "https://me:${oc.env:PASS}@host/", "what is 1/2?", "://", "x/?",
]  # fmt: skip


@pytest.mark.parametrize("text", HIDDEN)
def test_secret_parts_are_hidden_and_names_stay(text: str) -> None:
    assert hide_in_urls(text) == HIDDEN[text]
    assert hide_in_urls(HIDDEN[text]) == HIDDEN[text]
    assert is_redacted(HIDDEN[text]) == ("://" in text)


@pytest.mark.parametrize("text", PLAIN)
def test_text_without_a_secret_url_stays(text: str) -> None:
    assert hide_in_urls(text) == text and not is_redacted(text)


def test_no_value_of_any_url_is_left_and_it_can_be_put_back() -> None:
    rng = random.Random(3)
    kept: list[str] = []

    def keep(part: str) -> str:
        kept.append(part)
        return f"<{len(kept) - 1}>"

    for _ in range(2000):
        values = ["".join(rng.choices("aB7%._~!$'()*+,;:@-[]{}|", k=rng.randint(1, 12))) + "Zq9" for _ in range(3)]
        user, first, second = values
        url = f"https://{user.replace('@', '')}:x@host.example/f.jsonl?a={first}&sig={second}"
        for text in (url, f"data_source.url={url}"):
            kept.clear()
            assert "Zq9" not in hide_in_urls(text), text
            back = hide_in_urls(text, keep)
            for number, part in enumerate(kept):
                back = back.replace(f"<{number}>", part)
            assert back == text


@pytest.mark.parametrize(
    "text", ["a" * 10**6 + "/?" + "b" * 10**6, "a://" * 10**5 + "@?=", "a:" * 10**5 + "://@?"]
)
def test_a_long_text_takes_no_long_time(text: str) -> None:
    started = time.process_time()
    hide_in_urls(text)
    assert time.process_time() - started < 5  # 0.1 s; a quadratic search takes minutes
