"""The command sglang: its commands, its help, and completion in real shells."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from sglang.cli import completion
from sglang.cli.main import main
from sglang.srt import flags
from sglang.srt.server_args import FLAGS, make_parser
from sglang.srt.upstream_flags import UNSUPPORTED_FLAGS
from sglang.version import __version__

LIMIT_S = 60


def test_version_and_help(capsys):
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"sglang {__version__}\n"
    assert main(["--help"]) == 0
    assert "completion" in capsys.readouterr().out


def test_no_command_and_unknown_ones_are_errors_that_help(capsys):
    assert main([]) == 2
    assert "usage: sglang COMMAND" in capsys.readouterr().err
    assert main(["srve"]) == 2
    assert "did you mean serve?" in capsys.readouterr().err
    assert main(["version", "please"]) == 2
    assert main(["completion", "tcsh"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err


def test_serve_takes_the_flags_of_the_server(capsys):
    assert main(["serve", "--port", "many"]) == 2
    assert "--port: expected an integer" in capsys.readouterr().err
    assert main(["serve", "--speculative-algorithm", "EAGLE"]) == 2
    assert "known in SGLang but not supported" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    assert capsys.readouterr().out.startswith("usage: sglang serve --model-path MODEL")


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "sglang", "version"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    assert done.stdout == f"sglang {__version__}\n"


@pytest.mark.parametrize("columns", [20, 60, 90, 400])
def test_help_is_as_wide_as_the_terminal_within_reason(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, *lines = make_parser().format_help().splitlines()  # the usage is one line in any case
    # A flag with its choices is not broken.
    longest = max(len(line) for line in lines if not line.lstrip().startswith("-"))
    limit = min(max(columns, flags.MIN_COLUMNS), flags.MAX_COLUMNS)
    assert limit - 25 < longest <= limit


def test_help_has_a_section_for_every_concern_and_no_flag_that_is_not_served():
    text = make_parser().format_help()
    for group in {spec.group for spec in FLAGS}:
        assert f"\n{group}:\n" in text
    words = set(text.replace(",", " ").split())
    assert not words & UNSUPPORTED_FLAGS


def bash_completes(*words: str) -> list[str]:
    """What bash offers for the last word, split as readline does it."""
    script = completion.bash()
    array = " ".join(f"'{word}'" for word in words)
    program = f"""{script}
COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}
_sglang
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-eu", "-c", program],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
class TestBash:
    def test_commands(self):
        assert bash_completes("sglang", "") == ["serve", "version", "completion"]
        assert bash_completes("sglang", "se") == ["serve"]
        assert bash_completes("sglang", "completion", "z") == ["zsh"]

    def test_every_flag_is_offered(self):
        offered = bash_completes("sglang", "serve", "--")
        assert set(offered) == {name for spec in FLAGS for name in spec.names} | {
            "--help",
            "--version",
            "--config",
        }
        assert bash_completes("sglang", "serve", "--host", "::", "--enable-pdm") == [
            "--enable-pdmux"
        ]

    @pytest.mark.parametrize(("word", "offered"), [("b", ["bfloat16"]), ("int", [])])
    def test_choices(self, word, offered):
        assert bash_completes("sglang", "serve", "--dtype", word) == offered

    def test_choices_behind_an_equals_sign(self):
        assert bash_completes("sglang", "serve", "--slo-overload", "=") == ["queue", "shed"]
        assert bash_completes("sglang", "serve", "--slo-overload", "=", "s") == ["shed"]

    def test_free_values_are_not_guessed(self):
        assert bash_completes("sglang", "serve", "--port", "") == []

    def test_paths_come_from_the_disk(self, tmp_path):
        (tmp_path / "model-a").mkdir()
        offered = bash_completes("sglang", "serve", "--model-path", f"{tmp_path}/mod")
        assert offered == [f"{tmp_path}/model-a"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_parse_in_their_shells(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    subprocess.run(
        [shell, "-n"], input=completion.SCRIPTS[shell](), text=True, timeout=LIMIT_S, check=True
    )


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_hear_of_every_flag_and_choice(shell):
    script = completion.SCRIPTS[shell]()
    for spec in FLAGS:
        for name in spec.names:
            assert (name if shell == "zsh" else f"-l {name[2:]}") in script
        for choice in spec.choices or ():
            assert str(choice) in script


def test_quotes_in_help_do_not_end_a_shells_string():
    """Both shells read a line of our script as one word a quoted part."""
    for line in completion.zsh().splitlines():
        if line.strip().startswith("'"):
            assert line.replace(r"'\''", "").count("'") == 2, line
    for line in completion.fish().splitlines():
        assert line.replace(r"\'", "").count("'") % 2 == 0, line
