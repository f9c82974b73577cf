"""Settings are declared once; validation, help and documentation say the same of them."""

import dataclasses
import math
import pickle
import re
from pathlib import Path

import pytest

from hpseg.cli.main import main
from hpseg.run.config import Config, make_config
from hpseg.run.errors import UsageError
from hpseg.run.presets import METHOD_PRESETS, PRESETS
from hpseg.run.settings.declaration import checked
from hpseg.run.settings.described import (
    GROUPS,
    choices_of,
    default_text,
    flag,
    help_text,
    page,
    plain,
    range_text,
    title,
)
from hpseg.run.settings.methods import OF_METHOD

SETTINGS = [(group, field) for group in GROUPS for field in dataclasses.fields(group)]
PAGE = Path(__file__).parents[3] / "docs" / "settings.md"
every_setting = pytest.mark.parametrize("group, field", SETTINGS, ids=[field.name for _, field in SETTINGS])


def shown(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    assert ended.value.code == 0
    return capsys.readouterr().out


def flags_of(text):
    """The flags that a help text explains, by group."""
    found = {}
    for line in text.splitlines():
        if re.match(r"\S.*:$", line):
            group = found.setdefault(line.removesuffix(":"), [])
        elif match := re.match(r"  (?:-h, )?(--[\w-]+)", line):
            group.append(match[1])
    return found


def test_every_setting_belongs_to_one_group():
    names = [field.name for _, field in SETTINGS]
    assert len(names) == len(set(names)) and set(names) == {field.name for field in dataclasses.fields(Config)}


def test_every_setting_says_what_it_means():
    said = [field.metadata["help"] for _, field in SETTINGS]
    assert len(set(said)) == len(said)
    for text in said:
        assert len(text.split()) > 1 and text == text.strip() and not text.endswith(".") and "\n" not in text, text


def test_the_short_help_shows_what_people_need(capsys):
    text = shown(capsys, "--help")
    groups = flags_of(text)
    assert groups.pop("options") == ["--help", "--help-all", "--out", "--resume", "--overwrite", "--no-report"]
    found = {name for names in groups.values() for name in names}
    assert found == {flag(field) for _, field in SETTINGS if field.metadata["basic"]} - {"--images"}
    assert len(found) == 20 and {"--classes", "--method", "--steps", "--batch-size", "--lr"} <= found
    usage, *_ = text.split("\n\n")
    assert len(usage) < 100 and "`hpseg train --help-all` shows every setting" in " ".join(text.split())
    with pytest.raises(SystemExit):
        main(["train"])
    assert usage in capsys.readouterr().err


def test_the_whole_help_shows_every_setting_in_its_group(capsys):
    text = shown(capsys, "--help-all")
    groups = {name: flags for name, flags in flags_of(text).items() if name not in ("options", "positional arguments")}
    assert groups == {
        title(group): [flag(field) for field in dataclasses.fields(group) if field.name != "images"] for group in GROUPS
    }
    words = "".join(text.split())
    for group, field in SETTINGS:
        assert "".join(field.metadata["help"].split()) in words, field.name
        if field.name != "images":
            assert "".join(help_text(group, field).split()) in words, field.name


@every_setting
def test_what_is_told_of_the_range_is_what_is_accepted(group, field):
    def accepted(value):
        try:
            return checked(field, value) == value
        except UsageError:
            return False

    assert accepted(field.default) and not accepted([])
    choices, text, kind = field.metadata["choices"], range_text(field), str(field.type)
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", text)]
    one = {"int": int, "float": float}.get(kind)
    if choices:
        assert choices == choices_of(field) and all(map(accepted, choices)) and not accepted("another")
    elif field.metadata["numbers"]:
        assert accepted("3,1") and not accepted("0") and not accepted("1.5") and not accepted("")
    elif text == "64 bits":
        assert accepted(-(2**63)) and accepted(2**63 - 1) and not accepted(2**63)
    elif text.startswith("above"):
        assert accepted(numbers[0] + 1e-9) and not accepted(numbers[0])
    elif text:
        step = 1 if kind == "int" else 1e-9
        assert accepted(one(numbers[0])) and not accepted(one(numbers[0]) - step)
        if " to " in text:
            assert accepted(one(numbers[1])) and not accepted(one(numbers[1]) + step)
        else:
            assert text.startswith("at least") and accepted(one(1e9))
    elif one:
        assert accepted(one(-1e9)) and accepted(one(1e9))
    if kind == "float":
        assert not accepted(math.nan) and not accepted(math.inf) and not accepted(True)


@every_setting
def test_the_default_that_is_told_is_that_of_a_run(group, field):
    text = default_text(group, field)
    if field.metadata["required"]:
        assert text == "required"
        return
    configs = {method: make_config(method=method) for method in METHOD_PRESETS}
    own = [method for method, settings in OF_METHOD.items() if settings is group]
    for method in field.metadata["methods"] or own or METHOD_PRESETS:
        if field.name != "method":
            value = plain(getattr(configs[method], field.name))
            assert text.startswith(value) or re.search(rf"{re.escape(value)} with [\w, ]*\b{method}\b", text), text


def test_defaults_name_the_methods_that_differ():
    texts = {field.name: default_text(group, field) for group, field in SETTINGS}
    assert texts["steps"] == "200, 400 with stego" and texts["root"] == "none" and texts["crop"] == "random"
    assert texts["weight_decay"] == "0.1, 0 with stego and fs4, 0.0001 with dgcl, 0.01 with lookbeyond"
    assert texts["contrast_by_class"] == "on" and texts["supervised_share"] == "0.1"  # of dgcl-small


def test_the_page_is_current():
    assert page() == PAGE.read_text(encoding="utf-8"), "python -m hpseg.run.settings.described > docs/settings.md"
    for preset, values in PRESETS.items():
        assert f"| `{preset}` | " in page() and f"steps {values['steps']}" in page()


def test_a_config_goes_through_pickle_and_replace():
    config = make_config("potsdam", images="photos")
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, steps=3).steps == 3
    with pytest.raises(UsageError, match=r"lr: expected at least 0, got -1$"):
        make_config(lr=-1)
    assert isinstance(make_config(lr=1).lr, float) and make_config(steps=10**400).steps == 10**400
