import pytest

from merging.errors import StorageError
from merging.io import storage
from merging.io.secrets import holds_secret, redacted

SECRET = (
    "https://user:hunter2@host/x",
    "https://hunter2@github.com/x",
    "https://user:hunter2@ss/w@host/x",
    "s3://key:hunter2@bucket/x",
    "ftp://user:hunter2@host",
    "zip://a.json::https://user:hunter2@host/x.zip",
    "simplecache::https://hunter2@host/x",
    "zip://x::https%3A%2F%2Fuser%3Ahunter2@host",
    "https://host/x?token=hunter2",
    "https://host/x?hf_token=hunter2",
    "https://host/x#access_token=hunter2",
    "https://host/x?X-Amz-Signature=hunter2",
    "https://host/x?sv=1&sig=hunter2",
    "https://host/x?download=true&key=hunter2",
    "https://host/x?api_key=hunter2",
    "zip://a::https://host/x.zip?sig=hunter2",
    "az://container/x?AccountKey=hunter2",
)
HARMLESS = (
    "s3://bucket/key",
    "s3://bucket/key=3/part@v1.parquet",
    "gs://bucket/tokens=5/x.parquet",
    "abfs://container@account.dfs.core.windows.net/x",
    "az://container@account.dfs.core.windows.net/x",
    "hf://datasets/user/name@main/x",
    "https://host/x?version=2",
    "https://host/x?max_tokens=5",
    "http://localhost:9000/bucket/a@b",
    "https://[::1]:80/x@y",
    "zip://data/*.csv::s3://bucket/file.zip",
    "memory://a/b",
)


@pytest.mark.parametrize("address", SECRET)
def test_an_address_with_a_secret_is_refused_without_repeating_it(address):
    assert holds_secret(address)
    assert "hunter2" not in redacted(f"cannot read {address}: no")
    with pytest.raises(StorageError) as reported:
        storage.read_bytes(address)
    assert "hunter2" not in str(reported.value)


@pytest.mark.parametrize("address", HARMLESS)
def test_other_addresses_stay_as_they_are(address):
    assert not holds_secret(address)
    assert redacted(address) == address


def test_what_programs_say_is_redacted():
    reported = (
        "401 for https://u:hunter2@h/x?a=1&token=hunter2 (Authorization: Bearer hunter2hunter2) password = hunter2"
    )
    assert redacted(reported) == "401 for https://***@h/x?a=1&token=*** (Authorization: Bearer ***) password = ***"
    assert (
        redacted("max_new_tokens=5, token_id=3, tokenizer=fast, key=2")
        == "max_new_tokens=5, token_id=3, tokenizer=fast, key=2"
    )


def test_secrets_of_the_environment_are_redacted(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    monkeypatch.setenv("MY_TOKEN", "hunter3hunter3")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "hunter4hunter4==")
    assert redacted("no hunter4hunter4==, AccountName=me;AccountKey=hunter5") == "no ***, AccountName=me;AccountKey=***"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/somebody")
    assert (
        redacted("denied for hunter2hunter2 (hunter3hunter3), see /home/somebody")
        == "denied for *** (***), see /home/somebody"
    )
