"""A setting that a flag and a `key=value` can both set: either alone has its effect, both together are refused (W3)."""

import argparse

import pytest

from report_fixtures import score_table, word_tokenizer
from sepo.cli import main
from sepo.cli.arguments import build_parser
from sepo.data.tables import SCHEMAS, make_table, read_table, write_table
from sepo.recipe.settings import SelectSettings, TrainingSettings

# command -> the flags that set the same thing as a key.
BOTH = {
    "select": {
        "k_chosen": [["--k", "0.6"], ["--k-chosen", "0.6"]],
        "k_rejected": [["--k", "0.6"], ["--k-rejected", "0.6"]],
        "include_end": [["--include-end"]],
    },
    "oracle": {},
    "train": {},
}
KEYS = {"select": SelectSettings, "oracle": TrainingSettings, "train": TrainingSettings}
PAIRS = [(key, flag) for key, flags in BOTH["select"].items() for flag in flags]


def options_of(command: str) -> set[str]:
    parsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest for action in parsers.choices[command]._actions}


@pytest.mark.parametrize("command", BOTH)
def test_every_setting_with_two_spellings_is_in_the_table(command):
    assert set(KEYS[command].model_fields) & options_of(command) == set(BOTH[command])


@pytest.mark.parametrize(("key", "flag"), PAIRS)
def test_either_spelling_selects_the_same_and_both_are_refused(key, flag, tmp_path, capsys):
    table = score_table(word_tokenizer()).select(SCHEMAS["scores"].names)
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    ends = [columns["chosen_ids"][0][-1]]
    write_table(tmp_path / "scores", make_table("scores", columns, {"tokenizer": "test", "end_ids": ends}))
    value = flag[1] if len(flag) > 1 else "true"
    override = [f"{key}={value}"] + ([f"k_rejected={value}"] if flag[0] == "--k" and key == "k_chosen" else [])
    override += [f"k_chosen={value}"] if flag[0] == "--k" and key == "k_rejected" else []

    everything = ["--k", "1"] if key == "include_end" else []  # else no end is among the highest

    def select(name, *words):
        out = str(tmp_path / name)
        code = main(["select", "--table", str(tmp_path / "scores"), "--out", out, *everything, *words])
        return code, read_table(tmp_path / name, "selection") if code == 0 else None

    plain, flagged, set_ = select("plain"), select("flag", *flag), select("set", *override)
    assert flagged == set_
    assert flagged[1] != plain[1]
    for other in (value, "0.2" if len(flag) > 1 else "false"):
        code, table = select("both", *flag, f"{key}={other}")
        assert (code, table) == (2, None)
        assert f"{key} is also set by an option" in capsys.readouterr().err
