"""The declaration: what is shipped parses, both forms are read, and what is unknown or wrong is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from everloop import config as configuration
from everloop.config import Config, RewardConfig
from everloop.errors import ConfigError
from everloop.home import Home

from reward import declaration
from reward.handler import RewardHandler
from reward.model import RewardModel

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "bank_desk"
CHECK = '[[check]]\nname = "c"\nkind = "{}"\n{}\n'
JUDGE = '[[judge]]\nname = "j"\nurl = "http://h/v1"\nmodel = "m"\nrubric = "r"\n'


def written(tmp_path: Path, text: str, name: str = "reward.toml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_the_example_is_read_by_the_policy_that_names_it() -> None:
    policy = configuration.load(EXAMPLE / "everloop.toml", {}).policy("bank", "desk")
    made = declaration.load(policy.reward.declaration)
    assert made.signal("thumb").most == 4.0
    assert not made.signal("implicit:abandoned").count
    assert [(check.name, check.kind) for check in made.check] == [("topic", "pattern")]


def test_the_judge_and_the_critic_that_the_example_shows_are_ones(tmp_path: Path) -> None:
    shown = (EXAMPLE / "reward.toml").read_text().replace("# [[judge]]", "[[judge]]").replace("# [critic]", "[critic]")
    for key in ("name", "url", "model", "rubric", "per_day", "key_file"):
        shown = shown.replace(f"# {key} =", f"{key} =")
    its = declaration.load(written(tmp_path, shown))
    judge, critic = its.asked
    assert (judge.name, judge.per_day, judge.key_file) == ("clarity", 500, None)
    assert (critic.source, critic.model, critic.key_file) == ("critic:self", None, tmp_path / "critic.key")


def test_where_a_key_lies_is_no_part_of_what_counts() -> None:
    one = {"url": "http://h/v1", "rubric": "r"}
    made = declaration.Declaration.model_validate
    here, there = (made({"critic": {**one, "key_file": path}}) for path in ("a", "b"))
    assert here.version == there.version
    assert here.version != made({"critic": {**one, "rubric": "s"}}).version


def test_a_python_file_says_the_same_as_a_table(tmp_path: Path) -> None:
    toml = written(tmp_path, JUDGE + 'key_file = "key"\n[combine]\ncap = 3.0\n')
    python = written(
        tmp_path,
        'JUDGE = {"name": "j", "url": "http://h/v1", "model": "m", "rubric": "r", "key_file": "key"}\n'
        'declaration = {"judge": [JUDGE], "combine": {"cap": 3.0}}\n',
        "reward.py",
    )
    made = declaration.load(toml)
    assert declaration.load(python) == made
    assert made.judge[0].key_file == tmp_path / "key"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[combin]\ncap = 1.0", "combin: unknown key; did you mean 'combine'"),
        ("[combine]\ncapp = 1.0", r"combine\.capp: unknown key"),
        ("[combine]\ncap = 0.0", r"combine\.cap: .*greater than 0"),
        ("[combine]\nprior = nan", r"combine\.prior"),
        ("[signals.thum]\nmost = 1.0", "'thum' is no source: use one of thumb"),
        ("[signals.implicit]\nmost = 1.0", "'implicit' is no source"),
        ("[signals.thumb]\nleast = 2.0\nmost = 1.0", r"least \(2\) is above most \(1\)"),
        (JUDGE + JUDGE, r"two \[\[judge\]\] have the name 'j'"),
        (JUDGE.replace("http://h", "h"), "is not a URL"),
        ('[[check]]\nname = "c"\n', r"check\.0\.kind: Field required"),
        ("[combine", "is not TOML"),
        (CHECK.format("pattern", 'options.pattern = "("'), r"'c': options\.pattern: '\(' is no regular expression"),
        (CHECK.format("json-schema", 'options.json_schema.type = "objekt"'), r"at \$\.type, 'objekt' is not valid"),
        (CHECK.format("json-schema", 'options.json_schema.pattern = "("'), r"'c': options\.json_schema: it is no JSON"),
        (CHECK.format("json-schema", ""), r"'c': reference: it compares .* none is named"),
        (CHECK.format("number", ""), r"\[\[check\]\] 'c': reference: .* name it \(in a declaration 'correction', or"),
        (CHECK.format("exact", ""), "'c': reference"),
        (CHECK.format("unit-tests", ""), "'c': reference"),
        (CHECK.format("number", 'reference = "constant"'), r'reference = "constant" and constant = … belong together'),
        (CHECK.format("number", "constant = 3"), "belong together"),
        (
            CHECK.format("number", 'reference = "constant"\nconstant = "three"'),
            "constant: 'three' is of no use: .* number",
        ),
        (
            CHECK.format("json-schema", 'reference = "constant"\nconstant = { type = 3 }'),
            "no use: the reference: it is",
        ),
        (CHECK.format("sql", 'reference = "constant"\nconstant = "SELEC"\noptions.setup = ""'), "constant: 'SELEC' is"),
    ],
)
def test_what_is_wrong_is_refused_and_says_why(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        declaration.load(written(tmp_path, text))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("pattern", r"options.pattern = '\d+ €'"),
        ("json-schema", 'options.json_schema = { type = "object" }'),
        ("json-schema", 'reference = "constant"\nconstant = { type = "object" }'),
        ("tool-calls", ""),
        ("number", 'reference = "correction"'),
        ("number", 'reference = "constant"\nconstant = 0'),
        ("unit-tests", 'options.tests = "def test_it(): pass"'),
        ("sql", 'reference = "constant"\nconstant = [[1]]\noptions.setup = ""'),
    ],
)
def test_a_check_that_has_what_it_needs_is_taken(tmp_path: Path, kind: str, more: str) -> None:
    path = written(tmp_path, CHECK.format(kind, more))
    assert declaration.load(path).check[0].kind == kind


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for name, text, told in (
        ("reward.json", "{}", "must be a .toml or a .py file"),
        ("reward.py", "1 / 0", "does not run: ZeroDivisionError"),
        ("reward.py", "other = 1", "no table under the name 'declaration'"),
    ):
        with pytest.raises(ConfigError, match=told):
            declaration.load(written(tmp_path, text, name))
    with pytest.raises(ConfigError, match="there is no reward declaration"):
        declaration.load(str(tmp_path / "none.toml"))


def test_the_service_does_not_start_on_a_broken_one(tmp_path: Path) -> None:
    broken = written(tmp_path, "[combine]\ncap = -1.0")
    config = Config.model_validate(
        {"home": tmp_path / "home", "tenants": {"t": {"policies": {"p": {"reward": {"declaration": broken}}}}}}
    )
    with pytest.raises(ConfigError, match="cap"):
        RewardHandler(config, Home(config.home), lambda name: pytest.fail("no encoder is needed for this"))


def test_it_is_part_of_a_version_and_its_place_is_not(tmp_path: Path, words: Any) -> None:
    (tmp_path / "else").mkdir()
    plain = RewardModel(RewardConfig(), words).save(tmp_path / "made")
    text = "[combine]\npessimism = 2.0\n"
    declared = [
        RewardModel(RewardConfig(declaration=written(folder, text)), words).save(tmp_path / "made")
        for folder in (tmp_path, tmp_path / "else")
    ]
    assert declared[0] == declared[1] != plain
    loaded = RewardModel.load(tmp_path / "made" / declared[0], words)
    assert loaded.config.pessimism == 2.0
    assert loaded.declaration.combine.pessimism == 2.0
