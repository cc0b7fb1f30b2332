"""vLLM's own server as the teacher, in three ways: the joint is exact, and the samples are the model's own."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_server import vllm_server

from byte_level import save_writer
from omniopd.generation import Sampler, SampleRequest, load_sampler
from omniopd.teachers.base import ContinuationRequest, TeacherAnswer
from omniopd.teachers.resolve import open_teacher
from omniopd.types import Message

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

NAME = "writer"
QUESTION = "How many apples?"
# Some numbers are likelier than others, so that a wrong temperature shows.
TEXTS = [
    (QUESTION, f"Tom has {a} red apples and {b} green ones.\n{a} + {b} = {a + b} \u2192 {a + b}.")
    for a in (1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 7, 8)
    for b in (2, 5, 13)
]
ANSWER = TEXTS[7][1]
WAYS = ("tokens", "completions", "prefill")
SAMPLES = 1000


@dataclass(frozen=True)
class Served:
    """A server, and the same model in this process."""

    base_url: str
    folder: Path
    sampler: Sampler

    def ids(self, prefix: str) -> tuple[int, ...]:
        """Return what a model reads for a prefix that is handed over as text."""
        rendered = self.sampler.tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
        )
        return tuple(self.sampler.tokenizer(str(rendered) + prefix).input_ids)

    def drawn_ids(self, prefix: str) -> tuple[int, ...]:
        """Return ids of the same text that no tokenizer would make of it, as a student may well draw them."""
        encode = self.sampler.tokenizer
        return self.ids("") + tuple(i for character in prefix for i in encode(character).input_ids)

    def greedy(self, ids: Sequence[int], *, max_tokens: int) -> str:
        asked = SampleRequest(token_ids=tuple(ids), num_samples=1, max_tokens=max_tokens, temperature=0.0)
        return self.sampler.sample([asked])[0][0].text

    def body(self, way: str, prefix: str, **fields: Any) -> tuple[str, dict[str, Any]]:
        """Return path and body of the plain HTTP request that hands over a prefix."""
        if way == "tokens":
            return "/completions", {"prompt": list(self.drawn_ids(prefix)), **fields}
        if way == "completions":
            return "/completions", {"prompt": self.sampler.tokenizer.decode(self.ids(prefix)), **fields}
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": prefix}]
        flags = {"continue_final_message": True, "add_generation_prompt": False}
        return "/chat/completions", {"messages": turns, **flags, **fields}

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps({"model": NAME, **body}).encode()
        headers = {"content-type": "application/json"}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(self.base_url + path, data, headers), timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def ask(self, way: str, requests: list[ContinuationRequest], **settings: Any) -> list[TeacherAnswer]:
        """Ask as a run does."""
        spec = f"vllm:{NAME}@{self.base_url}"

        async def run() -> list[TeacherAnswer]:
            teacher = open_teacher(
                spec, continuation=way, tokenizer_path=self.folder, shares_vocabulary=True, **settings
            )
            try:
                return await teacher.continuations(requests)
            finally:
                await teacher.aclose()

        return asyncio.run(run())

    def request(self, way: str, prefix: str, **fields: Any) -> ContinuationRequest:
        ids = self.drawn_ids(prefix) if way == "tokens" else None
        messages = (Message(role="user", content=QUESTION),)
        return ContinuationRequest(messages=messages, prefix=prefix, token_ids=ids, **fields)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("vllm")
    model = save_writer(folder / NAME, TEXTS, vocabulary=300, hidden=64, seed=1, steps=80)
    with vllm_server(model, name=NAME, log=folder / "server.log") as base_url:
        yield Served(base_url, model, load_sampler(model, device="cpu", dtype="float32"))


# At a word, inside a word, inside a number, after a space, after a line break, after an arrow of three bytes.
PREFIXES = ["Tom", "Tom ha", "Tom has 3 red apples and 1", "Tom has 3 ", ANSWER[: ANSWER.index("\n") + 1]]
PREFIXES += [ANSWER[: ANSWER.index("\u2192") + 1]]


@pytest.mark.parametrize("way", WAYS)
def test_the_server_reads_the_very_tokens_and_goes_on_from_them(served: Served, way: str) -> None:
    for prefix in PREFIXES:
        handed_over = prefix if way == "tokens" else prefix.rstrip()
        ids = served.drawn_ids(handed_over) if way == "tokens" else served.ids(handed_over)
        path, body = served.body(way, handed_over, temperature=0, max_tokens=24, return_token_ids=True)
        answer = served.post(path, body)
        (choice,) = answer["choices"]
        read = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
        assert tuple(read) == ids
        text = choice["text"] if path == "/completions" else choice["message"]["content"]
        assert text == served.greedy(ids, max_tokens=24)
        # Prefix and continuation are one text: no character is lost or doubled where they meet.
        whole = served.sampler.tokenizer.decode([*ids[len(served.ids("")) :], *choice["token_ids"]], True)
        assert whole == handed_over + text


@pytest.mark.parametrize("way", WAYS)
def test_a_run_gets_what_the_model_would_write(served: Served, way: str) -> None:
    requests = [served.request(way, prefix, n=1, max_tokens=24, seed=1) for prefix in ["", *PREFIXES]]
    answers = served.ask(way, requests, temperature=0.0)
    for request, answer in zip(requests, answers, strict=True):
        prefix = request.prefix
        sent = prefix if way == "tokens" else prefix.rstrip()
        ids = request.token_ids or served.ids(sent)
        (continuation,) = answer.continuations
        assert continuation.is_exact and continuation.text is not None
        expected = sent + served.greedy(ids, max_tokens=24)
        assert prefix + continuation.text == expected
        assert answer.usage.requests == 1 and answer.usage.input_tokens == len(ids)


def first_texts(served: Served, ids: Sequence[int]) -> dict[str, float]:
    """Return how likely each text of the next token is, from the model's own forward pass."""
    with torch.inference_mode():
        logits = served.sampler.model(torch.tensor([list(ids)])).logits[0, -1].double()
    likely: dict[str, float] = {}
    for token, probability in enumerate(logits.softmax(-1).tolist()):
        text = served.sampler.tokenizer.decode([token], skip_special_tokens=True)
        likely[text] = likely.get(text, 0.0) + probability
    return likely


def chi_square_p(drawn: Sequence[str], likely: dict[str, float]) -> float:
    """Return how often samples of `likely` lie at least as far from it as `drawn`; rare texts share a bin."""
    counts = Counter(drawn)
    common = {text for text, probability in likely.items() if probability * len(drawn) >= 5}
    bins = [(counts[text], likely[text] * len(drawn)) for text in common]
    rest = sum(p for text, p in likely.items() if text not in common) * len(drawn)
    others = len(drawn) - sum(count for count, _ in bins)
    if rest >= 5:
        bins.append((others, rest))
    else:
        # Too rare for a bin of its own, and too many of them would be a finding.
        assert others <= 5 * (rest + 3), f"{others} unlikely texts where {rest:.2f} were expected"
        bins[0] = (bins[0][0] + others, bins[0][1] + rest)
    assert len(bins) >= 4, "the model is too sure of itself to tell distributions apart"
    distance = sum((count - expected) ** 2 / expected for count, expected in bins)
    degrees = torch.tensor((len(bins) - 1) / 2)
    return float(torch.special.gammaincc(degrees, torch.tensor(distance / 2)))


BROAD = "Tom has"


@pytest.mark.parametrize("way", WAYS)
def test_plain_samples_have_the_models_own_distribution(served: Served, way: str) -> None:
    ids = served.drawn_ids(BROAD) if way == "tokens" else served.ids(BROAD)
    path, body = served.body(way, BROAD, n=SAMPLES, max_tokens=1, temperature=1.0, seed=11)
    choices = served.post(path, body)["choices"]
    drawn = [c["text"] if path == "/completions" else c["message"]["content"] for c in choices]
    assert len(drawn) == SAMPLES
    likely = first_texts(served, ids)
    assert chi_square_p(drawn, likely) > 0.001
    # The test can tell: the same counts are not those of a cooler teacher.
    cooler = {text: p**1.5 for text, p in likely.items()}
    total = sum(cooler.values())
    assert chi_square_p(drawn, {text: p / total for text, p in cooler.items()}) < 0.001


@pytest.mark.parametrize("way", WAYS)
def test_a_runs_samples_have_the_models_own_distribution(served: Served, way: str) -> None:
    request = served.request(way, BROAD, n=SAMPLES, max_tokens=1, seed=12)
    ids = request.token_ids or served.ids(BROAD)
    (answer,) = served.ask(way, [request], temperature=1.0)
    assert answer.usage.requests == 1 and len(answer.continuations) == SAMPLES
    likely = first_texts(served, ids)
    assert chi_square_p([c.text or "" for c in answer.continuations], likely) > 0.001
    own = SampleRequest(token_ids=tuple(ids), num_samples=SAMPLES, max_tokens=1, seed=12)
    (in_process,) = served.sampler.sample([own])
    assert chi_square_p([sample.text for sample in in_process], likely) > 0.001
