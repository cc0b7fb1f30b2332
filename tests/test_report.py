"""The report of a run: what it says, and that a real browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import run_fixture
from omniopd.errors import DataError, RunError
from omniopd.records import Records, read_metrics, rollout_files
from omniopd.report import build_report, render_summary
from omniopd.report.build import sample_rollouts
from omniopd.report.objective import describe_objective
from omniopd.run_folder import RunFolder
from omniopd.teachers.ledger import Ledger
from omniopd.types import Usage

HOSTILE = '</script><script>document.title="owned"</script> <!-- {{data}} {{script}} & \u2028 \U0001d465=1;\n\tend'


class Elements(HTMLParser):
    """Collects the elements of a page and the text of each kind."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def page_data(report: Path) -> dict[str, Any]:
    """Return the data that the page holds, found the way a browser does: up to the first end of a script."""
    text = report.read_text(encoding="utf-8")
    inside = re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.DOTALL | re.IGNORECASE)
    assert inside is not None
    data: dict[str, Any] = json.loads(inside[1])
    return data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_fixture.write_run(tmp_path_factory.mktemp("runs") / "finished")


def test_the_verdict_is_read_from_the_records(run: RunFolder) -> None:
    verdict = page_data(build_report(run.path))["verdict"]
    assert verdict["headline"] == "avg@16 30.1% to 47.9%"
    assert verdict["detail"] == "The student improved: +17.8 points, 95% interval 15.6 to 20.0."
    # 40 steps of 24 requests, 2,400 tokens read, 768 written, 0.00412 dollars.
    assert verdict["teacher_requests"] == 960
    assert verdict["teacher_tokens"] == {"read": 96_000, "written": 30_720}
    assert verdict["cost"] == "$0.1648"
    assert (verdict["seconds"], verdict["steps"]) == ("2m 11s", 40)


def test_the_page_is_self_contained_and_repeatable(run: RunFolder) -> None:
    report = build_report(run.path)
    first = report.read_bytes()
    assert build_report(run.path).read_bytes() == first
    page = first.decode()
    outside = [u for u in re.findall(r"https?://[^\"' )]+", page) if u != "http://www.w3.org/2000/svg"]
    assert outside == []
    loaders = [(tag, a) for tag, a in Elements(page).elements if tag in ("link", "img", "iframe") or "src" in a]
    assert loaders == []


def test_a_rollout_cannot_become_markup(tmp_path: Path) -> None:
    run = run_fixture.write_run(tmp_path / "r", num_steps=2, hostile_text=HOSTILE)
    report = build_report(run.path)
    scripts = [a for tag, a in Elements(report.read_text(encoding="utf-8")).elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    samples = page_data(report)["samples"]
    assert any("".join(sample["tokens"]) == HOSTILE for sample in samples)
    assert any(sample["prompt"][0]["content"] == HOSTILE for sample in samples)


def test_samples_are_spread_over_the_steps(run: RunFolder) -> None:
    samples, recorded = sample_rollouts(run, 12)
    assert recorded == 64  # 8 recorded steps of 8 rollouts
    assert [s["step"] for s in samples] == [5, 5, 10, 10, 15, 15, 20, 20, 25, 30, 35, 40]
    few, _ = sample_rollouts(run, 3)
    assert [s["step"] for s in few] == [5, 25, 40]  # positions 0, round(3.5) = 4 and 7 of 8
    assert sample_rollouts(run, 0) == ([], 64)
    everything, _ = sample_rollouts(run, 1000)
    assert len(everything) == 64


def test_a_page_stays_light(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniopd.report.build.MAX_SAMPLE_TOKENS", 50)
    samples, recorded = sample_rollouts(run, 60)
    # The rollouts have about 21 tokens, so the third one crosses the limit.
    assert (len(samples), recorded) == (2, 64)


def test_a_chunk_carries_its_evidence(run: RunFolder) -> None:
    samples, _ = sample_rollouts(run, 1000)
    chunks = [(sample, chunk) for sample in samples for chunk in sample["chunks"]]
    for sample, chunk in chunks:
        assert "".join(sample["tokens"][chunk["start"] : chunk["end"]]) == chunk["text"]
        for answer in chunk["continuations"]:
            assert (answer["text"] is None) == (answer["similarity"] is None) == (answer["missing"] is not None)
        known = [a["similarity"] for a in chunk["continuations"] if a["similarity"] is not None]
        if chunk["score"] is None:
            assert (len(known) < 2, chunk["missing"]) == (True, "too_few")
        else:
            assert chunk["score"] == pytest.approx(sum(known) / len(known))
    assert {chunk["score"] is None for _, chunk in chunks} == {True, False}


def test_long_curves_are_thinned_and_keep_the_last_step(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniopd.report.build.MAX_POINTS", 15)
    data = page_data(build_report(run.path))
    assert data["every"] == 3  # 40 steps on at most 15 points
    assert data["metrics"]["step"] == list(range(1, 41, 3))
    assert len(data["metrics"]["optim/loss"]) == 14


def test_costs_come_from_the_ledger_where_there_is_one(tmp_path: Path) -> None:
    run = run_fixture.write_run(tmp_path / "r", num_steps=2)
    ledger = Ledger(run.teacher().ledger)
    # The bill of a step that was lost with a crash is in the ledger alone.
    ledger.add("t", [], Usage(requests=100, input_tokens=1000, output_tokens=500, cost_usd=3.0), 1.0)
    ledger.close()
    data = page_data(build_report(run.path))
    assert (data["verdict"]["teacher_requests"], data["verdict"]["cost"]) == (100, "$3.00")
    costs = dict(map(tuple, data["costs"]))
    assert costs["per step"] == "$1.50"
    assert costs["answered from the ledger besides"] == "6"


def test_rollouts_without_scores_stand_in_the_table(tmp_path: Path) -> None:
    run = run_fixture.write_run(tmp_path / "r", num_steps=2, audited=False)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert "Rollouts that the teacher did not score" not in dict(map(tuple, page_data(build_report(run.path))["costs"]))
    rows = [{**row, "rollout/count": 8, "teacher/unscored/failed": 1} for row in rows]
    rows[1]["teacher/unscored/timeout"] = 2
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    costs = dict(map(tuple, page_data(build_report(run.path))["costs"]))
    # 1 + 1 + 2 of 2 x 8 rollouts.
    assert costs["Rollouts that the teacher did not score"] == "4 (25.0%): failed 2, timeout 2"


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    run = run_fixture.write_run(tmp_path / "r", num_steps=3, finished=False)
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "ti')  # the run goes on while we look
    verdict = page_data(build_report(run.path))["verdict"]
    assert verdict["headline"] == "Started at avg@16 30.1%"
    assert verdict["detail"] == "Unfinished: 3 of 6 steps are recorded. The closing evaluation has not been made."
    assert verdict["finished"] is False


def test_a_run_that_has_barely_begun_has_a_report(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", resume=False, overwrite=False)
    folder.write_resolved(run_fixture.config())
    data = page_data(build_report(folder.path))
    assert data["verdict"]["detail"].startswith("Unfinished: 0 of 40 steps")
    assert (data["samples"], data["metrics"], data["environment"]) == ([], {}, None)


def test_a_white_box_run_needs_neither_evaluations_nor_audits(tmp_path: Path) -> None:
    run = run_fixture.write_run(tmp_path / "r", num_steps=3, evaluated=False, audited=False)
    data = page_data(build_report(run.path))
    assert data["verdict"]["headline"] == "Not evaluated"
    assert data["verdict"]["cost"] == "none"
    assert all(sample["chunks"] == [] for sample in data["samples"])
    assert dict(map(tuple, data["costs"]))["Teacher cost"] == "nothing was asked"


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.001, 0.1, "The student improved"), (-0.1, -0.001, "The student got worse"), (-0.01, 0.1, "No change")],
)
def test_the_verdict_follows_the_interval(tmp_path: Path, low: float, high: float, words: str) -> None:
    run = run_fixture.write_run(tmp_path / "r", num_steps=1)
    summary = json.loads(run.summary.read_text())
    summary["avg_at_k"]["ci95"] = [low, high]
    run.summary.write_text(json.dumps(summary))
    assert page_data(build_report(run.path))["verdict"]["detail"].startswith(words)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a folder"):
        build_report(tmp_path / "missing")
    with pytest.raises(RunError, match="is not a run"):
        build_report(tmp_path)


def test_a_damaged_rollout_file_is_named(tmp_path: Path) -> None:
    run = run_fixture.write_run(tmp_path / "r", num_steps=1)
    ((_, path),) = rollout_files(run)
    path.write_text('{"rollout"\n')
    with pytest.raises(DataError, match=r"step-000001\.jsonl:1 is not a recorded rollout"):
        build_report(run.path)


def _match(log_ratio: float, overlap: float | None) -> dict[str, object]:
    means = {"log_ratio": log_ratio} | ({} if overlap is None else {"overlap_ratio": overlap})
    return {
        "top_k": 16,
        "means": means,
        "by_position": {name: [value, None, value] for name, value in means.items()},
        "by_correctness": {"log_ratio": {"correct": log_ratio / 2, "wrong": None, "unverified": None}},
    }


def write_diagnostics(run: RunFolder) -> None:
    """Add what the diagnostics of a run with two teachers leave behind, an alarm and a probe among it."""
    records = Records(run)
    records.diagnostics({"step": 1, "match": {"math": _match(-0.4, 0.5), "code": _match(-0.9, None)}})
    records.diagnostics({"step": 3, "alarms": {"length": f"rollouts now have 90 tokens {HOSTILE}"}})
    records.diagnostics({"step": 4, "match": {"math": _match(-0.2, 0.75)}, "prefix": {"math": {"lines": ["one"]}}})
    rows = read_metrics(run.metrics)
    lines = [json.dumps({**row, "alarm/length": float(row["step"] in (3, 4)), "alarm/repetition": 0.0}) for row in rows]
    run.metrics.write_text("\n".join(lines) + "\n")


def test_the_diagnostics_are_drawn_from_their_rows(tmp_path: Path) -> None:
    run = run_fixture.write_run(tmp_path / "r", num_steps=4)
    assert page_data(build_report(run.path))["diagnostics"] == {
        "teachers": [],
        "alarms": {"steps": {}, "said": []},
        "probes": {},
    }
    write_diagnostics(run)
    found = page_data(build_report(run.path))["diagnostics"]
    math, code = found["teachers"]
    assert (math["name"], code["name"]) == ("math", "code")
    assert math["means"] == {"log_ratio": [[1, -0.4], [4, -0.2]], "overlap_ratio": [[1, 0.5], [4, 0.75]]}
    assert math["by_correctness"] == {"log_ratio": {"correct": [[1, -0.2], [4, -0.1]], "wrong": []}}
    assert math["profiles"]["overlap_ratio"] == [
        {"step": 1, "values": [0.5, None, 0.5]},
        {"step": 4, "values": [0.75, None, 0.75]},
    ]
    # Compared once: one profile, and nothing of what its teacher cannot tell.
    assert code["profiles"] == {"log_ratio": [{"step": 1, "values": [-0.9, None, -0.9]}]}
    assert found["alarms"]["steps"] == {"length": [3, 4], "repetition": []}
    assert [(said["step"], said["name"]) for said in found["alarms"]["said"]] == [(3, "length")]
    assert found["probes"] == {"math": {"step": 4, "lines": ["one"]}}


def test_the_objective_in_words() -> None:
    objective = describe_objective(run_fixture.config())
    assert objective["text"][0].startswith("Reinforce each audited chunk by its agreement (edit)")
    assert dict(objective["parts"]) == {
        "supervision": (
            "chunked(chunker entropy(max_chunks 3, chunk_tokens 8), num_continuations 4, min_continuations 2, "
            "similarity edit, credit smoothed)"
        ),
        "transform 1": "drop_truncated",
    }
    losses = {"aggregation": "token_mean", "losses": {"kl": {"type": "reverse_kl", "top": 2.5}}}
    strange = describe_objective({"method": {"supervision": {"type": "telepathy", "range": None}}, "learner": losses})
    assert strange["text"] == ["Token losses are averaged over all tokens of a step."]
    assert dict(strange["parts"]) == {"supervision": "telepathy(range none)", "loss of kl": "reverse_kl(top 2.5)"}


def test_the_last_lines_of_a_run() -> None:
    summary = run_fixture.summary(40)
    assert render_summary(summary).splitlines() == [
        "greedy 81.0% -> 86.0%",
        "teacher tokens 1,234,567  requests 960  cost $?  time 2m 11s",
        "avg@16 30.1% -> 47.9%  (+17.8 points, 95% interval 15.6 to 20.0)",
    ]
    unmeasured = run_fixture.summary(40, evaluated=False) | {"cost_usd": 0.5, "train_seconds": None}
    assert render_summary(unmeasured) == "teacher tokens 1,234,567  requests 960  cost $0.5000"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not on PATH; install it to see the page drawn"
)


def browse(page: Path, profile: Path, *options: str) -> bytes:
    """Open a page in a browser of its own and return what it writes to stdout."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}"]
    command = [CHROMIUM, *flags, *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


def with_script(page: Path, script: str) -> Path:
    """Copy a page and let `script` act in it as a reader would."""
    copy = page.with_name("acted.html")
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return copy


def count_colors(png: bytes) -> int:
    """Count the distinct colours of an 8-bit RGB or RGBA picture (the filters of PNG 1.2, section 6)."""
    width, height, depth, kind = (*map(lambda i: int.from_bytes(png[i : i + 4], "big"), (16, 20)), png[24], png[25])
    assert (depth, kind in (2, 6)) == (8, True)
    size = 3 if kind == 2 else 4
    packed, at = b"", 8
    while at < len(png):
        length, name = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        packed += png[at + 8 : at + 8 + length] if name == b"IDAT" else b""
        at += length + 12
    raw, stride = zlib.decompress(packed), width * size
    above, colors = bytearray(stride), set()
    for y in range(height):
        kind, row = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 : (y + 1) * (stride + 1)])
        for i in range(stride) if kind else ():
            left, up, corner = (row[i - size], above[i], above[i - size]) if i >= size else (0, above[i], 0)
            row[i] = (row[i] + _predicted(kind, left, up, corner)) & 255
        colors.update(bytes(row[i : i + 3]) for i in range(0, stride, size))
        above = row
    return len(colors)


def _predicted(kind: int, left: int, up: int, corner: int) -> int:
    if kind < 4:
        return (0, left, up, (left + up) // 2)[kind]
    guess = left + up - corner
    return min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))[2]


@needs_chromium
def test_a_browser_builds_the_page(run: RunFolder, tmp_path: Path) -> None:
    dom = Elements(browse(build_report(run.path), tmp_path, "--dump-dom").decode())
    assert dict(dom.elements)["html"].get("data-ready") == "true"
    assert len(dom.of_class("chart")) == 9
    samples = page_data(run.report)["samples"]
    first = samples[0]
    assert len([a for tag, a in dom.elements if tag == "button" and "aria-current" in a]) == len(samples)
    # The end token has no text and is shown as a mark of its own.
    assert len(dom.of_class("token")) == len(first["tokens"]) - 1
    tones = [chunk["style"] for chunk in dom.of_class("chunk")]
    assert len(tones) == len(first["chunks"])
    assert all(re.fullmatch(r"--tone: rgb\(\d+,\d+,\d+\);", tone or "") for tone in tones)
    assert len({tone for tone in tones}) == len({chunk["score"] for chunk in first["chunks"]})
    assert len(dom.of_class("continuation")) == sum(len(chunk["continuations"]) for chunk in first["chunks"])
    shades = {token["style"] for token in dom.of_class("token")}
    assert len(shades) > 5


@needs_chromium
def test_a_browser_draws_the_diagnostics(tmp_path: Path) -> None:
    run = run_fixture.write_run(tmp_path / "r", num_steps=4)
    write_diagnostics(run)
    dom = Elements(browse(build_report(run.path), tmp_path / "profile", "--dump-dom").decode())
    assert dict(dom.elements)["html"].get("data-ready") == "true"
    pictures = [a["aria-label"] for tag, a in dom.elements if tag == "svg" and "aria-label" in a]
    assert pictures[pictures.index("Seconds a step") + 1 :] == [
        "Shared among the 16 likeliest tokens",
        "Teacher minus student, nats a token",
        "Teacher minus student, by verdict",
        "Teacher minus student along the rollout",
        "Shared likeliest tokens along the rollout",
        "Teacher minus student, nats a token",
        "Teacher minus student, by verdict",
        "Teacher minus student along the rollout",
        "alarms over the steps",
    ]
    # Two ends with two known tenths of three, two profiles; one end of the other teacher; steps 3 and 4 of an alarm.
    assert len([tag for tag, _ in dom.elements if tag == "title"]) == 2 * 2 * 2 + 2 + 2 + 1
    assert len([tag for tag, _ in dom.elements if tag == "script"]) == 2


@needs_chromium
def test_a_reader_moves_through_the_samples(tmp_path: Path) -> None:
    run = run_fixture.write_run(tmp_path / "r", num_steps=8, hostile_text=HOSTILE)
    act = """
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const all = (selector) => [...document.querySelectorAll(selector)];
      const log = [];
      const note = () => log.push(all(".pager span")[0].textContent + " " + all(".rollout")[0].textContent);
      note(); press("ArrowRight"); press("ArrowRight"); note(); press("ArrowLeft"); note();
      all(".segments button").find((b) => b.textContent.startsWith("Missing")).click(); note();
      all(".chunk")[0].click();
      log.push(all(".audit.active").length, document.title, all("script").length);
      document.body.replaceChildren();
      document.documentElement.dataset.log = JSON.stringify(log);
    """
    page = with_script(build_report(run.path), act)
    dom = dict(Elements(browse(page, tmp_path / "profile", "--dump-dom").decode()).elements)
    start, right, left, missing, active, title, num_scripts = json.loads(dom["html"]["data-log"] or "")
    samples = page_data(run.report)["samples"]

    def shown(sample: dict[str, Any]) -> str:
        return re.sub(r"\d: (none|\d\.\d\d)", "", "".join(sample["tokens"]))

    def written(entry: str) -> str:
        return re.sub(r"\d: (none|\d\.\d\d)", "", entry.partition(f"of {len(samples)} ")[2]).removesuffix("end")

    assert (start.split()[0], right.split()[0], left.split()[0]) == ("1", "3", "2")
    assert written(start) == shown(samples[0]) == HOSTILE.removesuffix("end") + "end"
    assert [written(right), written(left)] == [shown(samples[2]), shown(samples[1])]
    lacking = [s for s in samples if any(a["text"] is None for c in s["chunks"] for a in c["continuations"])]
    assert missing.startswith(f"1 of {len(lacking)} ")
    assert (active, title) == (1, "mini-math-omniopd - omniopd")
    assert num_scripts == 3  # the data, the page's own, and this test's: none of the rollout's


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_the_page(run: RunFolder, tmp_path: Path, scheme: str) -> None:
    picture = tmp_path / "page.png"
    preference = [] if scheme == "light" else ["--blink-settings=preferredColorScheme=0"]
    browse(
        build_report(run.path), tmp_path / "profile", f"--screenshot={picture}", "--window-size=700,500", *preference
    )
    assert count_colors(picture.read_bytes()) > 50
