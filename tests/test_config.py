from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cascadevl.config import config_keys, dump_config, load_config
from cascadevl.errors import ConfigError


class Colour(Enum):
    RED = "r"
    BLUE = "b"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    tile_px: int = 448
    max_tiles: int = 12
    thumbnail: bool = True

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise ConfigError(f"max_tiles is {self.max_tiles}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    meta: Path
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    name: str = "run"
    note: str | None = None
    seed: int = 0
    tiling: Tiling = field(default_factory=Tiling)
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, clip=None))
    lora: Optim | None = None
    sources: tuple[Data, ...] = ()
    stages: list[Optim] = field(default_factory=list)
    named: dict[str, Tiling] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    increment: float | Literal["random"] = 1.0
    frames: int | tuple[int, int] = 8
    out: Path | None = None
    colour: Colour = Colour.RED


@dataclass(frozen=True, kw_only=True, slots=True)
class Strict:
    data: Data
    optim: Optim


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_without_anything():
    assert load_config(Run) == Run()


def test_files_compose_left_to_right_and_overrides_come_last(tmp_path: Path):
    base = write(tmp_path / "base.yaml", "seed: 1\noptim: {lr: 1e-4, schedule: constant}\n")
    nano = write(tmp_path / "nano.yaml", "optim:\n  lr: 5e-4\ntiling: {tile_px: 112}\n")
    run = load_config(Run, files=[base, nano], overrides=["optim.clip=0.5", "--name", "x"])
    assert run == Run(
        seed=1,
        name="x",
        optim=Optim(lr=5e-4, schedule="constant", clip=0.5),
        tiling=Tiling(tile_px=112),
    )


def test_a_file_changes_single_keys_of_its_base(tmp_path: Path):
    (tmp_path / "bases").mkdir()
    write(tmp_path / "root.yaml", "seed: 1\nname: root\noptim: {lr: 1, clip: 3.0}\nwords: [a, b]")
    write(tmp_path / "bases" / "middle.yaml", "base: ../root.yaml\nname: middle\noptim: {lr: 2}")
    leaf = write(tmp_path / "leaf.yaml", "optim: {schedule: constant}\nbase: bases/middle.yaml")
    over = write(tmp_path / "over.yaml", "optim: {lr: 4}")
    run = Run(seed=1, name="middle", optim=Optim(lr=2.0, schedule="constant", clip=3.0),
              words=("a", "b"))  # fmt: skip
    assert load_config(Run, files=[leaf]) == run
    changed = load_config(Run, files=[leaf, over], overrides=["seed=5"])
    assert changed == dataclasses.replace(
        run, seed=5, optim=Optim(lr=4.0, schedule="constant", clip=3.0)
    )


def test_a_section_may_have_a_base_of_its_own(tmp_path: Path):
    (tmp_path / "bases").mkdir()
    write(tmp_path / "bases" / "root.yaml", "lr: 1\nclip: 3.0")
    write(tmp_path / "bases" / "optim.yaml", "base: root.yaml\nlr: 2")
    write(tmp_path / "tiling.yaml", "tile_px: 112")
    write(tmp_path / "run.yaml", "seed: 7\noptim: {clip: 4.0, schedule: constant}")
    leaf = write(
        tmp_path / "leaf.yaml",
        "base: run.yaml\noptim: {base: bases/optim.yaml, lr: 5}\n"
        "named: {one: {base: tiling.yaml}, two: {base: tiling.yaml, max_tiles: 3}}\n"
        "shares: {base: 0.5}",
    )
    # A section's base counts more than what the file's own base says of it, and less than the file.
    assert load_config(Run, files=[leaf]) == Run(
        seed=7,
        optim=Optim(lr=5.0, clip=3.0, schedule="constant"),
        named={"one": Tiling(tile_px=112), "two": Tiling(tile_px=112, max_tiles=3)},
        shares={"base": 0.5},
    )


def test_an_error_in_the_base_of_a_section_names_it(tmp_path: Path):
    base = write(tmp_path / "optim.yaml", "lr: fast")
    leaf = write(tmp_path / "leaf.yaml", "optim: {base: optim.yaml}")
    with pytest.raises(ConfigError, match=r"key 'optim\.lr' is 'fast'") as caught:
        load_config(Run, files=[leaf])
    assert str(caught.value).startswith(f"{base}: ")


def test_a_base_is_the_same_file_once_for_two_files_on_the_command_line(tmp_path: Path):
    write(tmp_path / "base.yaml", "seed: 1\noptim: {lr: 1}")
    files = [
        write(tmp_path / "a.yaml", "base: base.yaml\noptim: {lr: 2}"),
        write(tmp_path / "b.yaml", "base: ./base.yaml\nname: b"),
    ]
    # As always the later file wins, and what it says includes what its base says.
    assert load_config(Run, files=files) == Run(seed=1, name="b", optim=Optim(lr=1.0, clip=None))


def test_an_error_in_a_base_names_the_base(tmp_path: Path):
    base = write(tmp_path / "base.yaml", "optim: {lr: fast}")
    leaf = write(tmp_path / "leaf.yaml", "base: base.yaml\noptim: {clip: 1.0}")
    with pytest.raises(ConfigError, match=r"key 'optim\.lr' is 'fast'") as caught:
        load_config(Run, files=[leaf])
    assert str(caught.value).startswith(f"{base}: ")


def test_a_base_that_cannot_be_one_is_refused(tmp_path: Path):
    write(tmp_path / "one.yaml", "base: two.yaml")
    write(tmp_path / "two.yaml", "base: ./one.yaml")
    with pytest.raises(ConfigError, match=r"one\.yaml -> .*two\.yaml -> .*its own base"):
        load_config(Run, files=[tmp_path / "one.yaml"])
    leaf = write(tmp_path / "leaf.yaml", "base: absent.yaml")
    with pytest.raises(ConfigError, match=r"leaf\.yaml: base: .*absent\.yaml: No such file"):
        load_config(Run, files=[leaf])
    leaf = write(tmp_path / "leaf.yaml", "base: [one.yaml]")
    with pytest.raises(ConfigError, match=r"leaf\.yaml: base is \['one.yaml'\] \(list\)"):
        load_config(Run, files=[leaf])


def test_a_section_changed_in_part_keeps_the_defaults_its_parent_gave_it():
    assert load_config(Run, overrides=["optim.schedule=constant"]).optim == Optim(
        lr=1e-3, clip=None, schedule="constant"
    )


def test_defaults_given_as_an_instance_are_kept_where_nothing_is_said():
    preset = Run(seed=7, optim=Optim(lr=0.5, clip=2.0))
    run = load_config(Run, overrides=["optim.lr=0.25"], defaults=preset)
    assert run == dataclasses.replace(preset, optim=Optim(lr=0.25, clip=2.0))


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.lr=5e-6"],
        ["--optim.lr", "5e-6"],
        ["--optim.lr=5e-6"],
        ["optim={lr: 5e-6}"],
        ["optim.lr=1", "--optim.lr", "5e-6"],
    ],
)
def test_every_way_to_write_an_override(overrides: list[str]):
    assert load_config(Run, overrides=overrides).optim == Optim(lr=5e-6, clip=None)


def test_a_lone_flag_means_true_and_only_for_a_boolean():
    off = Run(tiling=Tiling(thumbnail=False))
    assert load_config(Run, overrides=["--tiling.thumbnail"], defaults=off) == Run()
    with pytest.raises(ConfigError, match=r"'seed' is True \(bool\), but must be int"):
        load_config(Run, overrides=["--seed", "--name", "x"])


def test_values_of_every_kind(tmp_path: Path):
    file = write(
        tmp_path / "all.yaml",
        """
note: "null"
lora: {lr: 1}
sources: [{meta: a.json}, {meta: b/c.json, weight: 2}]
stages: [{schedule: constant}]
named: {big: {tile_px: 224}}
shares: {a: 1, b: 0.5}
words: [on, no, 1e-5 x, é]
increment: random
frames: [8, 32]
out: runs/x
colour: BLUE
""",
    )
    run = load_config(Run, files=[file])
    assert run == Run(
        note="null",
        lora=Optim(lr=1.0),
        sources=(Data(meta=Path("a.json")), Data(meta=Path("b/c.json"), weight=2.0)),
        stages=[Optim(schedule="constant")],
        named={"big": Tiling(tile_px=224)},
        shares={"a": 1.0, "b": 0.5},
        words=("on", "no", "1e-5 x", "é"),
        increment="random",
        frames=(8, 32),
        out=Path("runs/x"),
        colour=Colour.BLUE,
    )
    assert isinstance(run.shares["a"], float)
    assert isinstance(run.sources[1].weight, float)


def test_values_of_every_kind_from_the_command_line():
    words = ["words=[on, b]", "increment=0.25", "frames=[1, 2]", "out=7", "colour=BLUE"]
    sections = ["sources=[{meta: 3x}]", "lora.lr=1", "shares.a=1", "named={n: {tile_px: 28}}"]
    texts = ["name=1e-3", "note=null"]
    assert load_config(Run, overrides=words + sections + texts, defaults=Run(note="x")) == Run(
        words=("on", "b"),
        increment=0.25,
        frames=(1, 2),
        out=Path("7"),
        colour=Colour.BLUE,
        sources=(Data(meta=Path("3x")),),
        lora=Optim(lr=1.0),
        shares={"a": 1.0},
        named={"n": Tiling(tile_px=28)},
        name="1e-3",
        note=None,
    )


def test_an_optional_section_can_be_set_and_unset(tmp_path: Path):
    on = write(tmp_path / "on.yaml", "lora: {lr: 0.5}")
    off = write(tmp_path / "off.yaml", "lora: null")
    assert load_config(Run, files=[on]).lora == Optim(lr=0.5)
    assert load_config(Run, files=[on, off]).lora is None
    assert load_config(Run, files=[off, on]).lora == Optim(lr=0.5)


def test_a_lone_true_switches_an_optional_section_on_and_changes_nothing_in_it(tmp_path: Path):
    on = write(tmp_path / "on.yaml", "lora: {lr: 0.5}")
    off = write(tmp_path / "off.yaml", "lora: null")
    assert load_config(Run, overrides=["--lora"]).lora == Optim()
    assert load_config(Run, overrides=["lora=true"]).lora == Optim()
    assert load_config(Run, files=[on], overrides=["--lora"]).lora == Optim(lr=0.5)
    assert load_config(Run, files=[on, off], overrides=["--lora"]).lora == Optim()
    assert load_config(Run, overrides=["--lora", "--lora.lr=1"]).lora == Optim(lr=1.0)
    assert load_config(Run, overrides=["--lora.lr=1", "--lora"]).lora == Optim(lr=1.0)
    given = load_config(Run, overrides=["--lora"], defaults=Run(lora=Optim(lr=2.0)))
    assert given.lora == Optim(lr=2.0)
    for word in ("lora=1", "lora=yes", "optim=true"):
        with pytest.raises(ConfigError, match="a section with the keys"):
            load_config(Run, overrides=[word])


def test_a_list_is_replaced_not_merged(tmp_path: Path):
    first = write(tmp_path / "1.yaml", "words: [a, b, c]")
    second = write(tmp_path / "2.yaml", "words: [d]")
    assert load_config(Run, files=[first, second]).words == ("d",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiling: {max_tile: 6}", "unknown key 'tiling.max_tile'; did you mean 'max_tiles'?"),
        ("sed: 6", "unknown key 'sed'; did you mean 'seed'?"),
        ("lr: 6", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("lora: {rank: 6}", "unknown key 'lora.rank'; known keys here: lr, betas, schedule, clip"),
        ("sources: [{meta: a, wieght: 1}]", "'sources.0.wieght'; did you mean 'weight'?"),
        ("named: {big: {px: 1}}", "unknown key 'named.big.px'"),
        ("optim: {lr: fast}", "key 'optim.lr' is 'fast' (str), but must be float"),
        ("seed: 1.5", "key 'seed' is 1.5 (float), but must be int"),
        ("seed: true", "key 'seed' is True (bool), but must be int"),
        ("seed: null", "key 'seed' is None (NoneType), but must be int"),
        ("name: 5", "key 'name' is 5 (int), but must be str"),
        ("tiling: {thumbnail: 1}", "'tiling.thumbnail' is 1 (int), but must be bool"),
        ("tiling: 3", "'tiling' is 3 (int), but must be a section with the keys tile_px,"),
        ("tiling: null", "'tiling' is None (NoneType), but must be a section"),
        ("seed: {a: 1}", "key 'seed' is {'a': 1} (dict), but must be int"),
        ("optim: {betas: [1]}", "'optim.betas' is [1] (list), but must be tuple[float, float]"),
        ("optim: {schedule: linear}", "'linear' (str), but must be 'cosine' or 'constant'"),
        ("increment: most", "'most' (str), but must be float or 'random'"),
        ("sources: [3]", "'sources.0' is 3 (int), but must be a section with the keys meta"),
        ("sources: [{}]", "missing key 'sources.0.meta': it has no default and must be Path"),
        ("shares: {a: x}", "'shares.a' is 'x' (str), but must be float"),
        ("colour: GREEN", "'GREEN' (str), but must be 'RED' or 'BLUE'"),
        ("tiling: {max_tiles: 0}", "tiling: max_tiles is 0; it must be at least 1"),
        ("seed: 1\nseed: 2", "not valid YAML: line 2, column 1: key 'seed' twice"),
        ("a: [1", "not valid YAML: line 1"),
        ("- 1", "a configuration is a mapping of keys, not [1] (list)"),
        ("&a [*a]", "not"),
    ],
)
def test_errors_name_file_key_and_remedy(tmp_path: Path, text: str, message: str):
    file = write(tmp_path / "wrong.yaml", text)
    fine = write(tmp_path / "fine.yaml", "optim: {clip: 0.5}")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, files=[fine, file])
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "command line: unknown key 'optim.lrr'; did you mean 'lr'?"),
        ("seed=x", "command line: key 'seed' is 'x' (str), but must be int"),
        ("seed", "command line: 'seed' changes no key; write key=value or --key value"),
        ("--", "command line: '--' changes no key"),
        ("=1", "command line: '=1' changes no key"),
        ("sources=[", "command line: sources: not valid YAML"),
        ("seed.x=1", "command line: key 'seed' is {'x': '1'} (dict), but must be int"),
    ],
)
def test_errors_in_overrides_name_the_command_line(tmp_path: Path, override: str, message: str):
    fine = write(tmp_path / "fine.yaml", "optim: {clip: 0.5}")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, files=[fine], overrides=[override])
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        load_config(Run, files=[tmp_path / "absent.yaml"])


def test_a_required_section_is_built_from_its_defaults_and_its_missing_key_named():
    assert load_config(Strict, overrides=["data.meta=m.json"]) == Strict(
        data=Data(meta=Path("m.json")), optim=Optim()
    )
    with pytest.raises(ConfigError, match=r"missing key 'data\.meta'"):
        load_config(Strict)


def test_keys_are_listed_in_order():
    keys = config_keys(Run)
    assert keys[:6] == ["name", "note", "seed", "tiling.tile_px", "tiling.max_tiles",
                        "tiling.thumbnail"]  # fmt: skip
    assert "lora.betas" in keys


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
texts |= st.sampled_from(["null", "~", "on", "no", "1e-3", "1_000", "0x1f", "1:30", "2020-01-01"])
texts |= st.sampled_from(["=", "<<", "true", ".inf", "- a", "a: b", "#"])
floats = st.floats(allow_nan=False)
optims = st.builds(
    Optim,
    lr=floats,
    betas=st.tuples(floats, floats),
    schedule=st.sampled_from(["cosine", "constant"]),
    clip=st.none() | floats,
)
runs = st.builds(
    Run,
    name=texts,
    note=st.none() | texts,
    seed=st.integers(),
    optim=optims,
    lora=st.none() | optims,
    sources=st.lists(
        st.builds(Data, meta=st.sampled_from([Path("a"), Path("1"), Path("/b c/é"), Path("null")]))
    ).map(tuple),
    stages=st.lists(optims, max_size=2),
    shares=st.dictionaries(texts, floats, max_size=2),
    words=st.lists(texts, max_size=3).map(tuple),
    increment=st.just("random") | floats,
    frames=st.integers() | st.tuples(st.integers(), st.integers()),
    out=st.none() | st.sampled_from([Path("a"), Path("1e3"), Path("null")]),
    colour=st.sampled_from(Colour),
)


@given(run=runs)
@settings(max_examples=40, phases=[Phase.generate])
def test_what_is_dumped_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, run: Run):
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(dump_config(run), encoding="utf-8")
    assert load_config(Run, files=[file]) == run


def test_a_float_that_is_not_a_number_survives_the_round_trip(tmp_path: Path):
    file = write(tmp_path / "nan.yaml", dump_config(Run(increment=math.nan)))
    assert isinstance(value := load_config(Run, files=[file]).increment, float)
    assert math.isnan(value)
