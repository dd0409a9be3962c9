"""The configuration: every mistake is one line that names it."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.config import ServiceConfig, load_config
from cluster.runs.served_model import load_served_model
from twotower.engine.settings import SETTINGS
from twotower.errors import ConfigError, InvalidRequest
from twotower.expert_formats import ExpertFormat
from twotower.model.checkpoint import Checkpoint
from twotower.text.chat_template import Conversation

DEMO = Path(__file__).parents[2] / "twotower" / "demo" / "checkpoint"
SHIPPED = sorted((Path(__file__).parents[2] / "deploy" / "serve").glob("*.yaml"))


def test_defaults_are_designs() -> None:
    config = load_config(None)
    assert config.model.checkpoint == "demo" and config.cell.placement == "auto"
    assert (config.ingress.host, config.ingress.http_port, config.ingress.grpc_port) == ("127.0.0.1", 8000, 50051)


@pytest.mark.parametrize("file", SHIPPED, ids=[file.name for file in SHIPPED])
def test_shipped_files_parse(file: Path) -> None:
    load_config(file)


def test_a_router_tells_weights_by_the_format_of_their_experts() -> None:
    """As a cell does, which holds them so: neither takes the other's runs over."""
    plain, ours = ServiceConfig.parse({}), ServiceConfig.parse({"model": {"experts": "int4", "expert_group": 16}})
    assert ours.engine.expert_format == ExpertFormat(4, 16)
    told = load_served_model(ours)
    assert told.fingerprint == Checkpoint.open(DEMO, ExpertFormat(4, 16)).fingerprint
    assert told.fingerprint != load_served_model(plain).fingerprint
    assert told.vocabulary == load_served_model(plain).vocabulary


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("cell: {placement: colocated, max_sequences: 4}\n")
    config = load_config(file, ["cell.max_sequences=8", "model.name=x", "cell.link_timeout_s=3"])
    assert (config.cell.placement, config.cell.max_sequences, config.model.name) == ("colocated", 8, "x")
    assert config.cell.link_timeout_s == 3.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.expert_group=16"], "model.expert_group: got 16 with experts stored, wanted 0: only int4 has groups"),
        (["model.experts=int4", "model.expert_group=24"], "model.experts: got 4 bits in groups of 24, wanted 8 bits"),
        (["model.experts=int3"], "model.experts: got 'int3', wanted one of 'stored', 'int8' or 'int4'"),
        (["cell.placment=split"], "cell.placment: unknown setting; did you mean placement?"),
        (
            ["cluster.target_ongoing_requests=8"],
            "cluster.target_ongoing_requests: gone; wanted target_fullness, the share",
        ),
        (["cluster.target_fullness=1.5"], "cluster.target_fullness: got 1.5, wanted less than or equal to 1"),
        (["cells.placement=split"], "cells: unknown setting; did you mean cell?"),
        (["cell.zzz=1"], "cell.zzz: unknown setting, wanted one of placement, device"),
        (["cell.placement=spilt"], "cell.placement: got 'spilt', wanted one of 'auto', 'split', 'colocated' or 'ar_"),
        (["cell.device=gpu"], "cell.device: got 'gpu', wanted auto, cpu, cuda or cuda:N"),
        (["cell.device=3"], "cell.device: got 3, wanted string"),
        (["cell.device=cuda:1"], "cell.device: got 'cuda:1', but with gpus_per_tower 1 a tower process sees 1 GPU"),
        (["cell.capture=0"], "cell.capture: got 0, wanted one of 'auto', 'on' or 'off'"),
        (["cell.max_sequences=0"], "cell.max_sequences: got 0, wanted greater than or equal to 1"),
        (["cell.max_sequences='8'"], "cell.max_sequences: got '8', wanted integer"),
        (["cell.max_sequences=true"], "cell.max_sequences: got True, wanted integer"),
        (["cell.link_timeout_s=.nan"], "cell.link_timeout_s: got nan, wanted"),
        (["decode.temperature=5000"], "decode.temperature: got 5000.0, wanted a number in [0, 1000]"),
        (["decode.temperature=.inf"], "decode.temperature: got inf"),
        (["decode.steps_per_block=99999"], "decode.steps_per_block: got 99999, wanted an integer from 1 to 1024"),
        (["decode.block_size=0", "decode.steps_per_block=0"], "; decode.steps_per_block: got 0"),
        (
            ["decode.max_new_tokens=99999"],
            "decode.max_new_tokens: got 99999 after a prompt of 1 tokens (100000",
        ),
        (
            ["model.max_sequence_length=100"],
            "decode.max_new_tokens: got 128 after a prompt of 1 tokens (129 together), wanted at most 100",
        ),
        (["cell.cache_tokens=4095"], "cell.cache_tokens: got 4095, wanted 0 (room for every sequence's longest) or at"),
        (["cell.link_timeout_s=2.9"], "cell.link_timeout_s: got 2.9, wanted greater than or equal to 3"),
        (['cell."a\nb"=1'], "unknown setting"),
        (["decode.confidence_threshold=1.5"], "decode.confidence_threshold: got 1.5"),
        (["cell.placement=colocated", "cell.ssm_wire_dtype=bfloat16"], "cell.ssm_wire_dtype: got bfloat16 with"),
        (["cell.placement=colocated", "cell.denoisers_per_context=2"], "cell.denoisers_per_context: got 2 with"),
        (["cluster.min_cells=3"], "cluster.max_cells: got 1, wanted at least min_cells (3)"),
        (["ingress.grpc_port=8000"], "ingress.grpc_port: got 8000, which is http_port too"),
        (["ingress.http_port=70000"], "ingress.http_port: got 70000"),
        (["cell"], "--set cell: wanted section.name=value"),
        (["cell=1"], "--set cell=1: wanted section.name=value"),
        (["cell.placement=["], "--set cell.placement=[: '[' is not a YAML value"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_service_takes_what_its_engines_take(name: str) -> None:
    """At and beside the ends of each setting that engines declare. (Of YAML's true and false: below.)"""
    [section] = [type(settings) for _, settings in ServiceConfig() if name in type(settings).model_fields]
    ends = (-1, 0, 1, 2.9, 3, 0.001, 5000, math.inf, math.nan)
    for value in (*ends, "5", None, "auto", "off", "often", [1], *([] if name == "capture" else [True])):
        taken = _is_taken(lambda value=value: SETTINGS[name].kind.read(name, value))
        assert _is_taken(lambda value=value: section(**{name: value})) == taken, value


def _is_taken(read: Callable[[], object]) -> bool:
    try:
        read()
    except (InvalidRequest, ValidationError):
        return False
    return True


def test_every_setting_says_what_it_means() -> None:
    for _, settings in ServiceConfig():
        assert all(field.description for field in type(settings).model_fields.values())


def test_what_fits_exactly_is_taken() -> None:
    load_config(None, ["model.max_sequence_length=129", "decode.mode=ar", "cell.cache_tokens=129"])
    load_config(None, ["model.max_sequence_length=129", "cell.placement=ar_only"])
    load_config(None, ["model.max_sequence_length=129", "decode.block_size=128"])


def test_several_mistakes_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["cell.placment=split", "model.dtpye=float32"])
    assert "placment" in str(caught.value) and "dtpye" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cell: [", "not YAML"),
        ("- a\n", "got a list, wanted sections"),
        ("cell: 5\n", "cell: got 5, wanted a mapping"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("# nothing\n")
    assert load_config(file) == ServiceConfig()


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(None).cell.max_sequences = 3  # type: ignore[misc]


@pytest.mark.parametrize(("written", "capture"), [("on", "on"), ("off", "off"), ("'off'", "off"), ("auto", "auto")])
def test_on_and_off_are_words(written: str, capture: str) -> None:
    """YAML has them for true and false."""
    assert load_config(None, [f"cell.capture={written}"]).cell.capture == capture


def test_a_device_may_name_a_gpu() -> None:
    assert load_config(None, ["cell.device=cuda:0"]).cell.device == "cuda:0"
    assert load_config(None, ["cell.device=cuda:1", "cell.gpus_per_tower=2"]).cell.device == "cuda:1"


def test_a_chat_template_is_a_text_or_a_file_that_every_process_finds() -> None:
    for given in ("/etc/chat.jinja", "{{ messages[-1].content }}", "{% if true %}a{% endif %}"):
        assert ServiceConfig.parse({"model": {"chat_template": given}}).model.chat_template == given
    for given, words in (("chat.jinja", "wanted an absolute path or a template's text"), ("", "at least 1 character")):
        with pytest.raises(ConfigError, match=f"^model.chat_template: got '{given}', .*{words}"):
            ServiceConfig.parse({"model": {"chat_template": given}})


def test_the_template_of_a_service_is_the_configured_one_else_the_checkpoint_s() -> None:
    given = "{{ messages[-1].content }}!"
    for model, made in (({}, "<s>a\n"), ({"chat_template": given}, "a!")):
        template = load_served_model(ServiceConfig.parse({"model": model})).chat_template
        assert template is not None
        assert template.render(Conversation(({"role": "user", "content": "a"},))) == made
