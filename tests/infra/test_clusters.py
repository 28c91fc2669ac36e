"""The files that start clusters, read by the tools that will read them, or by their schemas."""

import json
import re
from pathlib import Path

import botocore.session
import jsonschema
import kubernetes_validate
import pytest
import yaml
from botocore.validate import validate_parameters

import ray_tasks  # noqa: F401  # before Ray: it settles what that reads from the environment

INFRA = Path(__file__).parents[2] / "infra"
HERE = Path(__file__).parent
KUBERNETES = "1.33"
"""The release that manifests are held against; nothing in them is younger."""


def documents(name):
    return list(yaml.safe_load_all((INFRA / "kuberay" / name).read_text()))


def manifest(name):
    return documents(name)[0]


def cluster_spec(found):
    return found["spec"].get("rayClusterSpec", found["spec"])


def pods(found):
    spec = cluster_spec(found)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"] for group in groups] + [
        found["spec"][key] for key in ("submitterPodTemplate",) if key in found["spec"]
    ]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_resources_keep_to_their_contract(name):
    schema = json.loads((HERE / "kuberay.schema.json").read_text())
    found = manifest(name)
    jsonschema.Draft202012Validator(schema).validate(found)
    cluster_spec(found)["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(found)


def agrees(resource):
    """Whether Kubernetes' own schema knows all of it, and finds nothing missing."""
    try:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kubernetes_takes_the_pods(name):
    for pod in pods(manifest(name)):
        resource = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": pod}
        assert agrees(resource)
        for container in pod["spec"]["containers"]:
            assert re.search(r":\d[\w.-]*$", container["image"])
            assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
        pod["spec"]["containers"][0]["volumeMount"] = []
        assert not agrees(resource)


def test_kubernetes_takes_the_network_policy():
    (policy,) = documents("network-policy.yaml")
    assert agrees(policy)
    policy["spec"]["ingress"][0]["form"] = []
    assert not agrees(policy)


@pytest.mark.parametrize(("name", "gpus"), [("raycluster.yaml", 64), ("rayjob.yaml", 8)])
def test_rays_autoscaler_reads_the_kuberay_cluster(name, gpus):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    found = manifest(name)
    config = _derive_autoscaling_config_from_ray_cr({"metadata": found["metadata"], "spec": cluster_spec(found)})
    head, worker = config["available_node_types"]["headgroup"], config["available_node_types"]["gpu"]
    assert head["resources"]["CPU"] == 0
    assert (worker["resources"]["GPU"], worker["resources"]["CPU"]) == (1, 8)
    assert (worker["min_workers"], worker["max_workers"]) == (0, gpus)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_clusters_are_closed(name):
    found = manifest(name)
    spec = cluster_spec(found)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in pods(found):
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert not [variable for variable in container.get("env", []) if "TOKEN" in variable["name"]]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        room = re.fullmatch(r"(\d+)Gi", group["template"]["spec"]["volumes"][0]["emptyDir"]["sizeLimit"])
        # beyond /dev/shm, Ray would put its object store on the disk
        assert int(group["rayStartParams"]["object-store-memory"]) <= int(room[1]) << 30


def test_the_network_policy_lets_in_who_is_named():
    (policy,) = documents("network-policy.yaml")
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    # the label that the operator gives to every pod of a cluster
    assert policy["spec"]["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    for rule in policy["spec"]["ingress"]:
        assert rule["from"]
        assert all(peer["podSelector"]["matchLabels"] for peer in rule["from"])
    submitter = manifest("rayjob.yaml")["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    peers = [peer["podSelector"]["matchLabels"] for rule in policy["spec"]["ingress"] for peer in rule["from"]]
    assert submitter in peers


@pytest.fixture(scope="module")
def aws():
    return yaml.safe_load((INFRA / "aws.yaml").read_text())


def test_ray_up_takes_the_aws_file(aws):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(aws)
    validate_config(config)
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"]["priority"]
    assert config["provider"]["use_internal_ips"]
    (start,) = [command for command in config["head_start_ray_commands"] if "--head" in command]
    assert "--num-cpus=0" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert set(config["file_mounts"].values()) == {"~/.ray/auth_token"}


@pytest.mark.parametrize("node", ["head", "gpu_spot", "gpu_on_demand"])
def test_ec2_takes_the_machines(aws, node):
    # what Ray adds, and what it chooses from itself
    settings = aws["available_node_types"][node]["node_config"] | {"MinCount": 1, "MaxCount": 1}
    assert settings.pop("SubnetIds")
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    validate_parameters(settings, shape)
    assert settings["MetadataOptions"]["HttpTokens"] == "required"
    assert ("InstanceMarketOptions" in settings) == (node == "gpu_spot")
