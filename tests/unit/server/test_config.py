"""config.pbtxt: what is understood, and that nothing is silently dropped."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from export.spec import Component
from server.backends.image_config import image_config
from server.cli import parser, read_config
from server.config import FallbackPolicy, ModelConfig, ServeConfig
from server.errors import ConfigError
from server.launch import WorkerConfig, announce, announced
from server.queue_policy import LevelPolicy, QueuePolicy, TimeoutAction
from server.rpc.triton.model_config import read_model_file
from server.settings import LogFormat, LogSettings

OFF = {Component.DENOISER: "it = broken"}
QUEUE = QueuePolicy(by_level=((3, LevelPolicy(None, 2.0, TimeoutAction.DELAY)),), preferred_batch_sizes=(2,))
MODEL = ModelConfig("a", (512, 256), ((64, 64),), queue=QUEUE, devices=("cuda:1", "cuda:3"), response_cache=True)
LOG = LogSettings("/var/log/z=1", log_info=False, log_format=LogFormat.ISO8601)


def read(tmp_path: Path, text: str) -> ModelConfig:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "config.pbtxt").write_text(text)
    return image_config(read_model_file(folder))


def test_everything_has_a_default(tmp_path: Path) -> None:
    assert read(tmp_path, "") == ModelConfig("demo")


def test_what_is_said_is_taken(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        """
        name: "demo"
        max_batch_size: 2
        instance_group [ { count: 2 kind: KIND_CPU }, { count: 2 kind: KIND_GPU gpus: [0, 3] }, { count: 1 } ]
        dynamic_batching {
          preferred_batch_size: [ 2 ]
          max_queue_delay_microseconds: 5000
          priority_levels: 3
          default_queue_policy { max_queue_size: 5 }
          priority_queue_policy {
            key: 3
            value { timeout_action: DELAY default_timeout_microseconds: 2000000 allow_timeout_override: true }
          }
        }
        response_cache { enable: true }
        model_warmup { name: "320x256" }
        parameters { key: "default_size" value { string_value: "512x256" } }
        parameters { key: "warmup_sizes" value { string_value: "256x256, 512x256" } }
        parameters { key: "prompt_cache_size" value { string_value: "9" } }
        """,
    )
    assert config.max_batch_size == 2
    assert config.devices == ("cpu", "cpu", "cuda:0", "cuda:3", "cuda:0", "cuda:3", "auto")
    assert config.queue == QueuePolicy(
        levels=3,
        default_level=2,
        default=LevelPolicy(max_size=5),
        by_level=((3, LevelPolicy(128, 2.0, TimeoutAction.DELAY, request_may_set_timeout=True)),),
        preferred_batch_sizes=(2,),
        max_delay=0.005,
    )
    assert config.response_cache
    assert config.default_size == (512, 256)
    assert config.warmup_sizes == ((256, 256), (512, 256), (320, 256))
    assert config.prompt_cache_size == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "cannot be read"),
        ("no_such_field: 1", "cannot be read"),
        ('name: "other"', "differs from its folder's"),
        ("sequence_batching { }", "sequence_batching.* not supported"),
        ("dynamic_batching { preserve_ordering: true }", "preserve_ordering.* not supported"),
        ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "priority level 3 is not accepted"),
        ("dynamic_batching { priority_queue_policy { key: 9 value { } } }", "priority level 9 is not accepted"),
        ("instance_group { kind: KIND_MODEL }", "KIND_MODEL .* not supported"),
        ("instance_group { kind: KIND_CPU gpus: 0 }", "gpus only with the first two"),
        ("instance_group { count: 200 } instance_group { count: 57 }", "count 57 would make over 256 workers"),
        ("instance_group { count: 2147483647 kind: KIND_CPU }", "would make over 256 workers"),
        ('model_warmup { name: "large" }', "not WIDTHxHEIGHT"),
        ('model_warmup { name: "256x256" inputs { key: "x" value { } } }', "inputs not supported"),
        ('parameters { key: "color" value { string_value: "x" } }', "unknown parameter 'color'"),
        (
            'parameters { key: "max_size" value { string_value: "big" } }',
            "'big' is not accepted; a whole number from 1",
        ),
        (
            'parameters { key: "max_size" value { string_value: "٣" } }',
            "not accepted; a whole number from 1 to 2147483647",
        ),
        (
            'parameters { key: "max_num_images" value { string_value: "4294967297" } }',
            "a whole number from 1 to 2147483647",
        ),
        ('parameters { key: "default_num_inference_steps" value { string_value: "60" } }', "60 is over .* [(]50[)]"),
        (
            "dynamic_batching { preferred_batch_size: [ 2, -3 ] }",
            "preferred_batch_size -3 .* 1 to max_batch_size [(]4[)]",
        ),
        ("max_batch_size: 2 dynamic_batching { preferred_batch_size: 4 }", "preferred_batch_size 4 is not accepted"),
        ('parameters { key: "default_size" value { string_value: "256" } }', "not WIDTHxHEIGHT"),
        ('parameters { key: "default_size" value { string_value: "250x256" } }', "a multiple of 16"),
        ('parameters { key: "min_size" value { string_value: "16" } }', "min_size 16; engines are exported from 64 on"),
        ('parameters { key: "warmup_sizes" value { string_value: "4096x256" } }', "from 64 to 2048"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_bytes(b"# caf\xe9")
    with pytest.raises(ConfigError, match=r"config\.pbtxt cannot be read"):
        read_model_file(tmp_path)


def test_without_flags_the_config_has_its_defaults() -> None:
    assert read_config(parser().parse_args([])) == ServeConfig(Path("models"))


@pytest.mark.parametrize(
    ("flag", "accepted"),
    [
        ("--worker-timeout-secs=0", "a number of seconds above 0 is accepted"),
        ("--worker-timeout-secs=nan", "a number of seconds is accepted"),
        ("--worker-start-timeout-secs=inf", "a number of seconds is accepted"),
        ("--repository-poll-secs=0", "a number of seconds above 0 is accepted"),
        ("--exit-timeout-secs=-1", "a number of seconds is accepted"),
        ("--max-retries=-1", "a whole number from 0"),
        ("--log-verbose=-1", "a whole number from 0"),
        ("--response-cache-byte-size=-1", "a whole number of bytes is accepted"),
        ("--device=gpu", "auto, cpu, cuda or a GPU such as cuda:1 is accepted"),
        ("--device=cpu:7", "auto, cpu, cuda or a GPU"),
        ("--grpc-restricted-protocol=inference:a key=b", "a KEY of letters"),
        ("--grpc-restricted-protocol=inference:key= b", "a secret of printable ASCII"),
    ],
)
def test_a_flag_that_means_nothing_is_refused(flag: str, accepted: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([flag])
    assert ended.value.code == 2
    assert accepted in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", " \n", "first\nsecond", "clé"])
def test_a_token_that_nobody_or_everybody_has_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(SystemExit):
        parser().parse_args(["--grpc-bearer-token", str(tmp_path / "token")])
    assert "in one line is accepted, and an empty one is not" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load-model=demo"], "--load-model needs --model-control-mode explicit"),
        (["--grpc-server-cert=a.pem", "--grpc-server-key=b.pem"], "--grpc-use-ssl switches on"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(parser().parse_args(flags))


def test_a_group_of_gpus_without_a_list_is_all_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert read(tmp_path, "instance_group { kind: KIND_GPU }").devices == ("cuda:0", "cuda:1")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.pbtxt cannot be read"):
        read_model_file(tmp_path)


def test_a_workers_arguments_read_back() -> None:
    config = WorkerConfig(
        *(
            Path("/m/a"),
            MODEL,
            "3",
            "a-0",
            Path("/tmp/s"),
            "cuda:1",
            2,
            FallbackPolicy.REFUSE,
            9.0,
            90.0,
            OFF,
            LOG,
        )
    )
    again = WorkerConfig.parse(config.arguments())
    assert again == config
    assert again.log.log_format is LogFormat.ISO8601


def test_the_last_thing_a_worker_said_names_the_engine_that_ran(capsys: pytest.CaptureFixture[str]) -> None:
    announce(Component.PROMPT_ENCODER)
    announce(Component.DENOISER)
    said = capsys.readouterr().out
    assert announced(said) is Component.DENOISER
    assert announced(said + "the checkpoint is missing\n") is None
    assert announced("") is None
    assert announced(said[:-3]) is None


def test_a_request_may_only_shorten_the_queue_timeout_and_only_where_it_may() -> None:
    free, bounded = LevelPolicy(request_may_set_timeout=True), LevelPolicy(timeout=2.0, request_may_set_timeout=True)
    policies = (LevelPolicy(), LevelPolicy(timeout=2.0), free, bounded)
    assert [p.timeout_of(5.0) for p in policies] == [None, 2.0, 5.0, 2.0]
    assert bounded.timeout_of(1.0) == 1.0
    assert bounded.timeout_of(None) == 2.0


LOGS = r"""
import logging, sys
from server.rpc.triton.model_config import read_model_file
from server.settings import LogFormat, LogSettings
LogSettings(sys.argv[1], log_info=False, log_format=LogFormat.ISO8601).apply("100%-0")
logging.getLogger("x").info("not this")
logging.getLogger("x").warning("a file named %s", b"caf\xe9".decode("utf-8", "surrogateescape"))
"""


def test_a_process_logs_what_is_wanted_where_it_is_wanted(tmp_path: Path) -> None:
    file = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", LOGS, str(file)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\S+ WARNING 100%-0 x: a file named caf\\udce9\n", file.read_text())
