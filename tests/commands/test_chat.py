"""``peftcli chat``: one base, several adapters, commands in the conversation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import command_line, folder_adapter

from peftcli import adapters
from peftcli.commands.chat import answer
from peftcli.result import open_result


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, Path]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: folder_adapter(root / name, tiny_folders["llama"], seed) for seed, name in enumerate(("poet", "clerk"), 1)}


QUESTION = [{"role": "user", "content": "Say something"}]


def replies(pair: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What each of them, loaded by itself, answers to the first question."""
    opened = {name: open_result(path) for name, path in pair.items()} | {"base": open_result(pair["poet"], with_adapter=False)}
    said = {name: answer(one.model, one.base.tokenizer, QUESTION, 12, 0.0) for name, one in opened.items()}
    capsys.readouterr()
    assert len(set(said.values())) == 3, "they must differ, or switching would not show"
    return said


def test_switching_within_a_conversation(
    pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = replies(pair, capsys)
    loads = []
    real = adapters.load_base

    def counted(*args: Any, **kwargs: Any) -> Any:
        loads.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(adapters, "load_base", counted)
    typed = [
        "/adapters",
        "Say something",
        "/use clerk",
        "/reset",
        "Say something",
        "/base",
        "/reset",
        "Say something",
        "/use poet",
        "/reset",
    ]
    code, out, err = command_line(
        monkeypatch, capsys, "chat", *pair.values(), "--max-new-tokens", 12, stdin="\n".join([*typed, "Say something", "/exit", "never"])
    )
    assert code == 0
    assert [line.strip() for line in out.splitlines() if line.strip()] == [
        line.strip() for who in ("poet", "clerk", "base", "poet") for line in said[who].splitlines() if line.strip()
    ]
    assert "Adapters: poet, clerk; poet answers." in err
    assert "* poet clerk" in err
    assert "clerk answers" in err
    assert "the base answers" in err
    assert len(loads) == 1, "the base is loaded once"


def test_earlier_turns_count_until_they_are_forgotten(
    pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "One\nTwo\n/reset\nTwo\n"
    code, out, _ = command_line(monkeypatch, capsys, "chat", pair["poet"], "--max-new-tokens", 12, stdin=lines)
    assert code == 0
    first = open_result(pair["poet"])
    one = answer(first.model, first.base.tokenizer, [{"role": "user", "content": "One"}], 12, 0.0)
    turns = [{"role": "user", "content": "One"}, {"role": "assistant", "content": one}, {"role": "user", "content": "Two"}]
    two = answer(first.model, first.base.tokenizer, turns, 12, 0.0)
    alone = answer(first.model, first.base.tokenizer, turns[2:], 12, 0.0)
    assert two != alone
    assert out == capsys.readouterr().out, "streamed as it comes"


def test_mistakes_end_no_conversation(pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    typed = "/use pote\n/use\n/nonsense\n/help\nHello\n"
    code, out, err = command_line(monkeypatch, capsys, "chat", *pair.values(), "--max-new-tokens", 4, stdin=typed)
    assert code == 0
    assert "no adapter is called 'pote'; there are: poet, clerk (did you mean 'poet'?)" in err
    assert "/use wants the name of an adapter" in err
    assert "there is no command /nonsense" in err
    assert "/use NAME let this adapter answer" in err
    assert out.strip()


def test_one_prompt_for_all(pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = replies(pair, capsys)
    code, out, _ = command_line(
        monkeypatch, capsys, "chat", pair["poet"], "--adapter", f"office={pair['clerk']}", "-p", "Say something", "--max-new-tokens", 12
    )
    assert code == 0
    poet, office = out.split("office> ")
    assert poet.removeprefix("poet> ").strip() == said["poet"]
    assert office.strip() == said["clerk"]
    code, out, _ = command_line(monkeypatch, capsys, "chat", pair["clerk"], "-p", "Say something", "--max-new-tokens", 12)
    assert (code, out.strip()) == (0, said["clerk"])


def test_a_whole_model_is_a_base(
    tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = command_line(
        monkeypatch, capsys, "chat", tiny_folders["llama"], "--max-new-tokens", 12, stdin="/adapters\nSay something\n"
    )
    assert code == 0
    assert "there is only the base" in err
    alone = open_result(tiny_folders["llama"])
    assert out.strip() == answer(alone.model, alone.base.tokenizer, QUESTION, 12, 0.0)


def test_what_is_refused(
    pair: dict[str, Path],
    tmp_path: Path,
    tiny_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = folder_adapter(tmp_path / "other", tiny_folders["llama-tied"], 3)
    cases: list[tuple[list[object], str]] = [
        ([], "there is nothing to talk to"),
        ([*pair.values(), other], "the results are of different bases: poet is for"),
        (["--adapter", "poet"], "'poet' is not NAME=PATH"),
        (["--adapter", f"a b={pair['poet']}"], "'a b' cannot be an adapter's name"),
        (["--adapter", f"x={pair['poet']}", "--adapter", f"x={pair['clerk']}"], "two are called 'x'"),
        ([pair["poet"], "--adapter", f"poet={pair['clerk']}"], "is also the name of"),
        ([pair["poet"], "--quantization", "nf5"], "'nf5' is not one of"),
        ([tmp_path / "nothing"], "there is no folder"),
    ]
    for args, message in cases:
        code, out, err = command_line(monkeypatch, capsys, "chat", *args)
        assert (code, out) == (2, ""), args
        assert message in err, err


def test_through_a_pipe(pair: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peftcli", "chat", *map(str, pair.values()), "--max-new-tokens", "4"],
        input="Hello\n/use clerk\nHello\n", capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "clerk answers" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_system_prompt_stays(pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["chat", pair["poet"], "--system", "Rhyme", "--max-new-tokens", 12]
    _, out, _ = command_line(monkeypatch, capsys, *args, stdin="Hello\n/reset\nHello\n")
    one = open_result(pair["poet"])
    said = answer(one.model, one.base.tokenizer, [{"role": "system", "content": "Rhyme"}, {"role": "user", "content": "Hello"}], 12, 0.0)
    assert said
    assert out == 2 * capsys.readouterr().out
