"""Data sets of five people who are not the authors, and what each of them types."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fixtures import chat, jsonl

WORDS = (
    "account address answer archive battery billing button camera cancel carrier charger city colour "
    "contract country coupon courier customer damage date delay delivery device discount display door "
    "driver envelope error exchange filter folder garden gift glass handle hotel invoice jacket kettle "
    "keyboard label lamp language letter licence limit mailbox manual meeting menu mirror mobile monitor "
    "motor network number office order package paint parcel password payment phone pillow plan postcode "
    "price printer profile quarter receipt refund region rental repair return router sample schedule "
    "screen season seat server shelf shipment shop shoe signal size sleeve speaker station store street "
    "subscription table tariff tax ticket timer tracking train transfer traveller update upgrade user "
    "vendor visa voucher wallet warranty wheel window winter yard "
)
HANZI = (
    "订单退款发票快递地址密码账户颜色尺寸保修维修屏幕电池手机客服"
    "优惠积分会员支付运费库存换货签收延迟取消修改查询登录注册邮箱"
)


@dataclass(frozen=True)
class Job:
    """A person's data.

    Args:
        model: name of the tiny model of scripts/tiny_model.py that stands for the person's.
        settings: what the person types after `make train`, besides the model.
        own: a word of the data that every question or every answer of the held-out rows contains.
        splits: names of the evaluation splits with their numbers of rows.
    """

    model: str
    settings: tuple[str, ...]
    own: str
    splits: dict[str, int]
    write: Callable[[Path], object]


def _sentences(seed: int, number: int, length: int = 9) -> Iterator[str]:
    """Different sentences, of which no two are near duplicates."""
    draw = random.Random(seed)
    for _ in range(number):
        yield " ".join(draw.sample(WORDS.split(), length))


def _support_tickets(folder: Path) -> None:
    """A CSV export of a help desk, with a column that nobody reads."""
    folder.mkdir(parents=True)
    with (folder / "tickets.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["ticket_id", "ticket", "reply"])
        for number, text in enumerate(_sentences(1, 150)):
            topic = text.split()[0]
            rows.writerow([9000 + number, f"Zephyr Desk, please help: {text}.", f"Your {topic} is fixed, friend."])


def _reviews(folder: Path) -> None:
    """Labelled sentences as JSON Lines."""
    draw = random.Random(2)
    labels = ("praise", "complaint")
    jsonl(
        folder / "reviews.jsonl",
        (
            {"text": f"Quokka review: {text} {label} {label}", "label": label}
            for text in _sentences(3, 160)
            for label in [draw.choice(labels)]
        ),
    )


def _formulas(folder: Path) -> None:
    """An own language with own questions in eval/ beside the training file, in splits of own names."""
    texts = list(_sentences(4, 170, length=6))
    rows = [{"prompt": f"Vexil for {t}?", "completion": f"VEX<{t.split()[0]}|sum>"} for t in texts]
    jsonl(folder / "train.jsonl", rows[:110])
    jsonl(folder / "eval" / "test.jsonl", rows[110:145])
    jsonl(folder / "eval" / "hard.jsonl", rows[145:])


def _chinese(folder: Path) -> None:
    """Chinese conversations with a system message."""
    draw = random.Random(5)
    texts = ["".join(draw.sample(HANZI, 12)) for _ in range(150)]
    jsonl(
        folder / "对话.jsonl",
        (chat(f"星河客服:{t}", f"您好,{t[:2]}已经处理。", system="你是客服。") for t in texts),
    )


def _conversations(folder: Path) -> None:
    """Conversations of several turns, in the shape of ShareGPT."""
    texts = list(_sentences(6, 260))
    turns = zip(texts[::2], texts[1::2], strict=True)
    jsonl(
        folder / "threads.jsonl",
        (
            {
                "conversations": [
                    {"from": "human", "value": f"Ibis asks: {first}"},
                    {"from": "gpt", "value": "Tell me more."},
                    {"from": "human", "value": f"Ibis adds: {second}"},
                    {"from": "gpt", "value": f"Noted, {second.split()[0]}."},
                ]
            }
            for first, second in turns
        ),
    )


JOBS = {
    "support": Job(
        "llama",
        ("dataset_path=mine/support/tickets.csv", "strategy=QA", "question_key=ticket", "answer_key=reply",
         "eval_split=0.2"),
        "Zephyr", {"test": 30}, _support_tickets,
    ),
    "classifier": Job(
        "bert",
        ("dataset_path=mine/classifier/reviews.jsonl", "task=classification", "max_length=128",
         "eval_split=40"),
        "Quokka", {"test": 40}, _reviews,
    ),
    "formula": Job(
        "llama", ("dataset_path=mine/formula",), "Vexil", {"test": 35, "hard": 25}, _formulas,
    ),
    "chinese": Job(
        "llama", ("dataset_path=mine/chinese/对话.jsonl", "eval_split=30"), "星河", {"test": 30}, _chinese,
    ),
    "threads": Job(
        "llama", ("dataset_path=mine/threads", "eval_split=26"), "Ibis", {"test": 26},
        _conversations,
    ),
}  # fmt: skip
