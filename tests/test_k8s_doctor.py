"""`python -m launch.k8s doctor` against a stand-in for kubectl: what it finds and leaves alone."""

import json
from typing import Any

import pytest
from clusters import KUBECTL, NAMESPACE, SUBMIT, Cluster

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")

NODE = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {}}}
POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "mine-0-x",
        "labels": {"batch.kubernetes.io/job-name": "mine", "fmnist-dist/run-id": "mine"},
    },
    "spec": {"nodeName": "n1", "terminationGracePeriodSeconds": 15},
    "status": {"phase": "Running"},
}


def pod(**changed: dict[str, Any]) -> dict[str, Any]:
    return {**POD, **{part: {**POD[part], **more} for part, more in changed.items()}}


def node(**labels: str) -> dict[str, Any]:
    return {**NODE, "metadata": {"name": "n1", "labels": labels}}


def test_doctor_finds_nothing_in_what_was_submitted(cluster: Cluster) -> None:
    cluster.submit()
    assert cluster.told("doctor", "mine") == "mine: nothing found"


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (
            [pod(metadata={"deletionTimestamp": "2020-01-01T00:00:00Z"})],
            "delete pod mine-0-x --grace-period=0 --force",
        ),
        (
            [pod(metadata={"annotations": {"karpenter.sh/do-not-disrupt": "true"}})],
            "pod mine-0-x has karpenter.sh/do-not-disrupt",
        ),
        (
            [
                pod(spec={"terminationGracePeriodSeconds": 60}),
                node(**{"kubernetes.azure.com/scalesetpriority": "spot"}),
            ],
            "pod mine-0-x has a grace of 60 s on node n1, whose notice is 30 s (aks-spot)",
        ),
        (
            [
                pod(
                    status={
                        "conditions": [
                            {
                                "type": "PodScheduled",
                                "status": "False",
                                "lastTransitionTime": "2020-01-01T00:00:00Z",
                                "message": "0/3 nodes are available",
                            }
                        ]
                    }
                )
            ],
            "pod mine-0-x finds no node since 2020-01-01T00:00:00Z: 0/3 nodes are available",
        ),
        (
            [
                {
                    **POD,
                    "metadata": {
                        "name": "mine-store-y",
                        "labels": {
                            "fmnist-dist/run-id": "mine",
                            "app.kubernetes.io/component": "store",
                        },
                    },
                },
                node(**{"cloud.google.com/gke-spot": "true"}),
            ],
            "pod mine-store-y, the rendezvous store, is on spot node n1 (gke-spot)",
        ),
        (
            [
                pod(
                    status={
                        "containerStatuses": [
                            {
                                "name": "trainer",
                                "state": {
                                    "terminated": {
                                        "exitCode": 75,
                                        "message": json.dumps(
                                            {"reason": "s3://bucket: no answer of the store"}
                                        ),
                                    }
                                },
                            }
                        ]
                    }
                )
            ],
            "pod mine-0-x ended with exit code 75: s3://bucket: no answer of the store",
        ),
        (
            [
                {
                    "apiVersion": "networking.k8s.io/v1",
                    "kind": "NetworkPolicy",
                    "metadata": {"name": "open"},
                    "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}]},
                }
            ],
            "NetworkPolicy open lets everybody in, expected this run",
        ),
        (
            [
                {
                    "apiVersion": "policy/v1",
                    "kind": "PodDisruptionBudget",
                    "metadata": {"name": "careful"},
                    "spec": {"selector": {"matchLabels": {"fmnist-dist/run-id": "mine"}}},
                }
            ],
            "PodDisruptionBudget careful covers the trainers",
        ),
    ],
)
def test_doctor_finds_the_traps_of_spot_nodes_and_changes_nothing(
    cluster: Cluster, documents: list[dict[str, Any]], said: str
) -> None:
    cluster.submit()
    for each in documents:
        cluster.put(each)
    before = len(cluster.calls())
    ended = cluster.run("doctor", "mine")
    assert ended.returncode == 1, ended.stderr
    (line,) = [each for each in ended.stdout.splitlines() if said in each]
    assert line
    assert {each[2] for each in cluster.calls()[before:]} == {"get"}


SPOT = {"karpenter.sh/capacity-type": "spot", "karpenter.sh/nodepool": "pool"}


def nodepool(**disruption: str) -> dict[str, Any]:
    return {"kind": "NodePool", "metadata": {"name": "pool"}, "spec": {"disruption": disruption}}


def karpenter(**container: Any) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "karpenter"}
    return {
        "kind": "Deployment",
        "metadata": {"name": "karpenter", "namespace": "kube-system", "labels": labels},
        "spec": {"template": {"spec": {"containers": [container]}}},
    }


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (nodepool(), "NodePool pool moves pods off nodes that are little used"),
        (nodepool(consolidationPolicy="WhenEmpty"), None),
        (nodepool(consolidateAfter="Never"), None),
        (karpenter(), "Karpenter (kube-system/karpenter) has no INTERRUPTION_QUEUE"),
        (karpenter(env=[{"name": "INTERRUPTION_QUEUE", "value": "queue"}]), None),
        (karpenter(args=["--interruption-queue=queue"]), None),
        (karpenter(envFrom=[{"configMapRef": {"name": "settings"}}]), None),
    ],
)
def test_doctor_finds_settings_of_karpenter_that_cost_the_notice(
    cluster: Cluster, document: dict[str, Any], said: str | None
) -> None:
    """Wherever Karpenter runs; and says nothing of it where pods run on nodes of somebody else."""
    cluster.told(*["--overlay=eks-spot-karpenter" if "overlay" in e else e for e in SUBMIT])
    cluster.put(pod())
    cluster.put(document, namespace="kube-system" if document["kind"] == "Deployment" else None)
    cluster.put(node(**{"karpenter.sh/capacity-type": "spot"}))
    assert cluster.told("doctor", "mine") == "mine: nothing found"
    cluster.put(node(**SPOT))
    found = cluster.run("doctor", "mine").stdout.splitlines()
    assert [each for each in found if "arpenter" in each or "NodePool" in each] == [
        each for each in found if said is not None and each.startswith(said)
    ]
    assert len(found) == 1


def test_doctor_finds_what_keeps_the_notice_from_pods_that_are_on_spot_nodes_by_chance(
    cluster: Cluster,
) -> None:
    cluster.told(*["--overlay=cpu-local" if "overlay" in each else each for each in SUBMIT])
    budget = {"matchLabels": {"batch.kubernetes.io/job-name": "mine"}}
    cluster.put(
        {"kind": "PodDisruptionBudget", "metadata": {"name": "c"}, "spec": {"selector": budget}}
    )
    cluster.put(pod())
    cluster.put(node())
    assert cluster.told("doctor", "mine") == "mine: nothing found"
    cluster.put(pod(spec={"tolerations": [{"operator": "Exists"}]}))
    cluster.put(node(**{"cloud.google.com/gke-spot": "true"}))
    tolerant, budgeted = cluster.run("doctor", "mine").stdout.splitlines()
    assert tolerant.startswith("pod mine-0-x tolerates every taint")
    assert budgeted.startswith("PodDisruptionBudget c covers pods on spot nodes")


LONG_AGO = "2020-01-01T00:00:00Z"
STORE = {
    "name": "mine-store-y",
    "labels": {"fmnist-dist/run-id": "mine", "app.kubernetes.io/component": "store"},
}


def scheduled(status: str) -> dict[str, str]:
    return {"type": "PodScheduled", "status": status, "lastTransitionTime": LONG_AGO}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            pod(status={"phase": "Pending", "conditions": [scheduled("True")]}),
            "pod mine-0-x has a node since 2020-01-01T00:00:00Z and has not started",
        ),
        (
            pod(metadata=STORE, status={"conditions": [scheduled("False")]}),
            "pod mine-store-y finds no node since 2020-01-01T00:00:00Z",
        ),
        (
            pod(
                status={
                    "phase": "Pending",
                    "conditions": [scheduled("True")],
                    "containerStatuses": [
                        {
                            "name": "trainer",
                            "state": {"waiting": {"reason": "ErrImagePull", "message": "denied"}},
                        }
                    ],
                }
            ),
            "pod mine-0-x does not start: ErrImagePull: denied",
        ),
    ],
)
def test_doctor_finds_pods_that_do_not_start(
    cluster: Cluster, found: dict[str, Any], said: str
) -> None:
    cluster.submit()
    cluster.put(found)
    ended = cluster.run("doctor", "mine")
    assert ended.returncode == 1, ended.stderr
    (line,) = ended.stdout.splitlines()
    assert line.startswith(said)


def test_doctor_lets_pods_rest_that_have_ended(cluster: Cluster) -> None:
    cluster.told(*["--overlay=cpu-local" if "overlay" in each else each for each in SUBMIT])
    former = {
        "deletionTimestamp": LONG_AGO,
        "annotations": {"karpenter.sh/do-not-disrupt": "true"},
        "labels": {
            "batch.kubernetes.io/job-name": "mine",
            "batch.kubernetes.io/job-completion-index": "0",
        },
    }
    for name, phase in (("mine-0-x", "Failed"), ("mine-0-y", "Succeeded")):
        cluster.put(pod(metadata={**former, "name": name}, status={"phase": phase}))
    cluster.put(node(**{"kubernetes.azure.com/scalesetpriority": "spot"}))
    assert cluster.told("doctor", "mine") == "mine: nothing found"


def test_doctor_claims_nothing_of_nodes_that_it_may_not_see(cluster: Cluster) -> None:
    cluster.submit()
    cluster.put(pod(metadata={"deletionTimestamp": LONG_AGO}))
    (cluster.folder / "refuse-get-nodes").write_text("Error from server (Forbidden): nodes is ...")
    ended = cluster.run("doctor", "mine")
    assert ended.stderr.startswith("warning: this user may not see nodes")
    assert "(its node n1 cannot be seen by this user)" in ended.stdout


def test_doctor_finds_the_store_of_index_0_on_a_spot_node(cluster: Cluster) -> None:
    cluster.told(*["--overlay=cpu-local" if "overlay" in each else each for each in SUBMIT])
    labels = {"batch.kubernetes.io/job-name": "mine"}
    for index in (0, 1):
        numbered = labels | {"batch.kubernetes.io/job-completion-index": str(index)}
        cluster.put(pod(metadata={"name": f"mine-{index}-x", "labels": numbered}))
    cluster.put(node(**{"karpenter.sh/capacity-type": "spot"}))
    (line,) = cluster.run("doctor", "mine").stdout.splitlines()
    said = "pod mine-0-x, the rendezvous store, is on spot node n1 (eks-spot-karpenter)"
    assert line == said


def test_doctor_finds_indexes_that_nobody_works_on(cluster: Cluster) -> None:
    """0 and 5 run, 1 is done, 2 and 3 are given up, 4 waits, 6 for long, 7 never had a pod."""
    cluster.submit()
    job = cluster.object("job", "mine")
    job["spec"] |= {"completions": 8, "parallelism": 8}
    for each in job["spec"]["template"]["spec"]["containers"]:
        each["args"] = [a.replace("--nnodes=2:4", "--nnodes=2:8") for a in each["args"]]
    job["spec"]["maxFailedIndexes"] = 6
    job["status"] = {"startTime": LONG_AGO, "completedIndexes": "1", "failedIndexes": "2,3"}
    cluster.put(job)
    for index, (phase, ends) in {
        0: ("Running", 2000),
        4: ("Failed", 2),
        5: ("Pending", 9),
        6: ("Failed", 1999),
    }.items():
        counted = {
            "batch.kubernetes.io/job-index-failure-count": "1",
            "batch.kubernetes.io/job-index-ignored-failure-count": str(ends),
        }
        labels = {
            "batch.kubernetes.io/job-name": "mine",
            "batch.kubernetes.io/job-completion-index": str(index),
        }
        metadata = {"name": f"mine-{index}-x", "labels": labels, "annotations": counted}
        cluster.put(pod(metadata=metadata, status={"phase": phase}))
    lines = cluster.run("doctor", "mine").stdout.splitlines()
    assert [each.partition(":")[0] for each in lines] == [
        "index 2 is given up",
        "index 3 is given up",
        "index 6 has no pod",
        "index 7 has no pod",
    ]
    assert "after 2001 ends, preemptions too, Kubernetes waits 600 s" in lines[2]
    assert "kubectl --namespace fmnist-dist describe job mine says why" in lines[3]


def test_doctor_finds_what_somebody_has_changed_in_the_cluster(cluster: Cluster) -> None:
    cluster.submit()
    (cluster.folder / NAMESPACE / "networkpolicy" / "mine.json").unlink()
    job = cluster.object("job", "mine")
    job["spec"]["template"]["spec"]["tolerations"].append({"operator": "Exists"})
    cluster.put(job)
    ended = cluster.run("doctor", "mine")
    assert "no NetworkPolicy limits Ingress of Job mine" in ended.stdout
    assert "Job mine tolerates every taint" in ended.stdout
