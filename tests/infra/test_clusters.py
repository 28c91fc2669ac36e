"""The files that start clusters, read by the tools that will read them, or by their schemas."""

import json
import re
from importlib.resources import files
from pathlib import Path

import botocore.session
import jsonschema
import kubernetes_validate
import pytest
import yaml
from botocore.validate import validate_parameters
from referencing import Registry, Resource

import ray_tasks  # noqa: F401  # before Ray: it settles what that reads from the environment

INFRA = Path(__file__).parents[2] / "infra"
HERE = Path(__file__).parent
KUBERNETES = "1.33"
"""The release that manifests are held against; nothing in them is younger."""


def documents(name):
    return list(yaml.safe_load_all((INFRA / "kuberay" / name).read_text()))


def manifest(name):
    return documents(name)[0]


def cluster_spec(result):
    return result["spec"].get("rayClusterSpec", result["spec"])


def pods(result):
    spec = cluster_spec(result)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"] for group in groups] + [
        result["spec"][key] for key in ("submitterPodTemplate",) if key in result["spec"]
    ]


@pytest.fixture(scope="module")
def kuberay():
    """KubeRay's types by our schema of them, and those that they take from Kubernetes by its own."""
    shipped = files("kubernetes_validate") / f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json"
    registry = Resource.from_contents(json.loads(shipped.read_text())) @ Registry()
    schema = json.loads((HERE / "kuberay.schema.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=registry)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_takes_its_resources(kuberay, name):
    kuberay.check_schema(kuberay.schema)
    kuberay.validate(manifest(name))


def changed(result, path, value):
    """With a value in another's place, or without it where the value is `None`."""
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in way:
        result = result[step]
    if value is None:
        del result[last]
    else:
        result[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.name", "7-is-no-letter"),
        ("spec.rayVersion", None),  # a token is for Ray 2.52 and later, so KubeRay asks which it is
        ("spec.authOptions.mode", "Token"),
        ("spec.authOptions.secret", "mine"),
        ("spec.autoscalerOptions.idleTimeoutSeconds", "300"),
        ("spec.autoscalerOptions.upscalingMode", "default"),
        ("spec.autoscalerOptions.securityContext.capability", []),
        ("spec.headGroupSpec.serviceType", "None"),
        ("spec.headGroupSpec.minReplicas", 1),
        ("spec.headGroupSpec.template.spec.containers", []),
        ("spec.headGroupSpec.template.spec.container", []),
        ("spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.headGroupSpec.resources", {"CPU": "0"}),  # a second place for what rayStartParams says
        ("spec.workerGroupSpecs.0.rayStartParams.labels", "a=b"),
        ("spec.workerGroupSpecs.0.minReplica", 1),
        ("spec.workerGroupSpecs.0.minReplicas", -1),
        ("spec.workerGroupSpecs.0.groupName", None),
        ("spec.workerGroupSpecs.0.template", None),
    ],
)
def test_kuberay_refuses_a_wrong_cluster(kuberay, path, value):
    result = manifest("raycluster.yaml")
    changed(result, path, value)
    assert not kuberay.is_valid(result)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.submissionMode", "K8sJob"),
        ("spec.submissionMode", "InteractiveMode"),  # whose jobs are not tried again
        ("spec.submissionMode", "SidecarMode"),  # which has no pod to submit from
        ("spec.shutdownAfterJobFinishes", None),  # the seconds until it is gone say that it goes
        ("spec.activeDeadlineSeconds", 0),
        ("spec.clusterSelector", {"ray.io/cluster": "another"}),
        ("spec.rayClusterSpec", None),
        ("spec.rayClusterSpec.workerGroupSpec", []),
        ("spec.backofLimit", 3),
    ],
)
def test_kuberay_refuses_a_wrong_job(kuberay, path, value):
    result = manifest("rayjob.yaml")
    changed(result, path, value)
    assert not kuberay.is_valid(result)


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


def autoscaling(result):
    """What Ray's autoscaler makes of a resource: it has read it, and checked it by its own schema."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derive
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    return AutoscalingConfig(
        derive({"metadata": result["metadata"], "spec": cluster_spec(result)}), skip_content_hash=True
    )


def launched(config, demands):
    """Kind of node → how many Ray's autoscaler adds to a cluster without workers for what tasks and actors ask for."""
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(each) for each in demands]),
    )
    reply = ResourceDemandScheduler(event_logger=None).schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize(("name", "gpus"), [("raycluster.yaml", 64), ("rayjob.yaml", 8)])
def test_rays_autoscaler_reads_the_kuberay_cluster(name, gpus):
    config = autoscaling(manifest(name))
    assert config.get_head_node_type() == "headgroup"
    types = config.get_node_type_configs()
    assert types["headgroup"].resources == {"CPU": 0, "memory": 16 << 30}
    assert types["gpu"].resources == {"CPU": 8, "GPU": 1, "memory": 64 << 30}
    assert (types["gpu"].min_worker_nodes, types["gpu"].max_worker_nodes) == (0, gpus)
    assert (config.get_idle_timeout_s(), config.get_max_num_worker_nodes()) == (300, gpus)
    assert config.get_upscaling_speed() >= gpus  # all that are asked for at once


@pytest.mark.parametrize(("name", "gpus"), [("raycluster.yaml", 64), ("rayjob.yaml", 8)])
def test_rays_autoscaler_starts_a_node_for_every_gpu_that_is_asked_for(name, gpus):
    evaluator = {"CPU": 1, "GPU": 1}
    assert launched(autoscaling(manifest(name)), [evaluator] * 3) == {"gpu": 3}
    assert launched(autoscaling(manifest(name)), [evaluator] * 100) == {"gpu": gpus}
    assert launched(autoscaling(manifest(name)), [{"CPU": 1, "GPU": 0.25}] * 4) == {"gpu": 1}


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("spec.workerGroupSpecs.0.maxReplicas", None, KeyError),
        ("spec.workerGroupSpecs.0.maxReplicas", "64", TypeError),
        ("spec.workerGroupSpecs.0.template.spec.containers.0.resources", {}, ValueError),
        ("spec.headGroupSpec.rayStartParams.num-cpus", "none", ValueError),
        ("spec.autoscalerOptions.idleTimeoutSeconds", -60, jsonschema.ValidationError),
    ],
)
def test_rays_autoscaler_refuses_a_wrong_cluster(path, value, error):
    result = manifest("raycluster.yaml")
    changed(result, path, value)
    with pytest.raises(error):
        autoscaling(result)


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_clusters_are_closed(name):
    result = manifest(name)
    spec = cluster_spec(result)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in pods(result):
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        # with the one that the operator adds to the head's pod, or a restricted namespace refuses the head
        for container in (*pod["spec"]["containers"], spec["autoscalerOptions"]):
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
    assert settings["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/")  # EC2 looks it up
    assert ("InstanceMarketOptions" in settings) == (node == "gpu_spot")
