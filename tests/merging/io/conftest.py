import uuid

import pytest


@pytest.fixture(params=["local", "memory", "moto", "rclone", "gcs", "azure"])
def root(request, tmp_path):
    if request.param == "gcs":
        return f"{request.getfixturevalue('gcs_bucket')}/{uuid.uuid4().hex}"
    if request.param == "azure":
        return f"{request.getfixturevalue('azure_container')}/{uuid.uuid4().hex}"
    if request.param in ("moto", "rclone"):
        return request.getfixturevalue("s3_at")(request.getfixturevalue(f"{request.param}_endpoint"))
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path}"
