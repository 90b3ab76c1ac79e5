"""`python -m launch.k8s` against a stand-in for kubectl: the logic of our commands, no cluster.

`tests/clusters.py` runs it; `kubectl kustomize` is the real one.
"""

import json
import os
import shlex
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from clusters import IMAGE, KUBECTL, NAMESPACE, RUN_DIR, SUBMIT, Cluster
from jobdocuments import job_document, pod_documents
from jobs import ROOT

from launch.k8s.controller import Ended, JobController, Pod

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")

COMPLETE = {"type": "Complete", "status": "True"}
FAILED = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy"}


def test_submit_creates_suspended_completes_and_releases(cluster: Cluster) -> None:
    assert cluster.told(*SUBMIT) == f"submitted mine: 4 pods, run {RUN_DIR}"
    verbs = [each[2] for each in cluster.calls()]
    assert verbs == ["get", "get", "apply", "create", "apply", "patch"]
    assert "--dry-run=server" in cluster.calls()[2]
    job = cluster.object("job", "mine")
    assert job["spec"]["suspend"] is False
    assert job["metadata"]["annotations"]["fmnist-dist/run-dir"] == RUN_DIR
    for kind, name in (
        ("service", "mine"),
        ("service", "mine-store"),
        ("deployment", "mine-store"),
        ("configmap", "mine-settings"),
        ("networkpolicy", "mine"),
    ):
        (owner,) = cluster.object(kind, name)["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == ("Job", job["metadata"]["uid"])
        assert owner["blockOwnerDeletion"] is True, "a deletion waits for all that is owned"
    assert "ownerReferences" not in cluster.object("serviceaccount", "fmnist-dist")["metadata"]


def test_kueue_releases_what_is_in_its_queue(cluster: Cluster) -> None:
    cluster.told(*SUBMIT, "--queue=research")
    job = cluster.object("job", "mine")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert job["spec"]["suspend"] is True
    for verb in ("suspend", "resume"):
        code, line = cluster.refused(verb, "mine")
        assert (code, "Kueue starts and stops what is in its queue research" in line) == (64, True)


def test_the_same_run_goes_on_when_its_job_has_ended(cluster: Cluster) -> None:
    cluster.submit()
    cluster.edit("job", "mine", status={"conditions": [FAILED]})
    assert cluster.told(*SUBMIT).startswith("resumed mine: 4 pods")
    assert "status" not in cluster.object("job", "mine")


@pytest.mark.parametrize("other", [[], ["--run-id=another"], [f"--run-dir={RUN_DIR}/"]])
def test_two_live_jobs_on_one_run_are_refused(cluster: Cluster, other: list[str]) -> None:
    cluster.submit()
    words = [each for each in SUBMIT if not other or each.split("=")[0] != other[0].split("=")[0]]
    code, line = cluster.refused(*words, *other)
    assert code == 76
    assert "Job mine has it and is running" in line
    assert cluster.names("job") == ["mine"]


def test_a_job_that_another_submission_has_just_made_is_not_deleted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.submit()
    monkeypatch.setattr("launch.k8s.submit.rivals", lambda *_, **__: [])  # when the list was read
    code, line = cluster.refused(*SUBMIT)
    assert (code, "Job mine has it and is running" in line) == (76, True), line
    assert cluster.names("job") == ["mine"]


@pytest.mark.parametrize(
    "words", [SUBMIT, *([verb, "mine"] for verb in ("status", "suspend", "cancel", "doctor"))]
)
def test_jobs_of_others_are_left_alone(cluster: Cluster, words: list[str]) -> None:
    theirs = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "mine", "uid": "theirs"},
        "spec": {"completions": 1, "template": {"spec": {}}},
    }
    cluster.put(theirs)
    code, line = cluster.refused(*words)
    assert (code, "the Job of this name in namespace" in line) == (64, True), line
    assert cluster.object("job", "mine") == theirs


def test_another_run_beside_it_is_none_of_its_business(cluster: Cluster) -> None:
    cluster.submit()
    cluster.told(*[f"--run-dir={RUN_DIR}-2" if "run-dir" in each else each for each in SUBMIT])
    assert cluster.names("job") == ["mine", "mine-2"]
    assert cluster.names("service") == ["mine", "mine-2", "mine-2-store", "mine-store"]


def test_what_cannot_be_completed_is_taken_back(cluster: Cluster) -> None:
    refusal = 'Error from server (Forbidden): deployments.apps is forbidden: User "u" cannot patch'
    (cluster.folder / "refuse-patch").write_text(refusal)
    assert cluster.refused(*SUBMIT) == (64, f"launch.k8s: kubectl patch job mine: {refusal}")
    assert cluster.names("job") == []
    (cluster.folder / "refuse-patch").unlink()
    cluster.told(*SUBMIT)


@pytest.mark.parametrize(("verb", "expected"), [("create", 76), ("apply", 75)])
def test_a_submission_at_the_same_moment_is_not_disturbed(
    cluster: Cluster, verb: str, expected: int
) -> None:
    refusal = 'Error from server (AlreadyExists): jobs.batch "mine" already exists'
    (cluster.folder / f"refuse-{verb}").write_text(refusal)
    assert cluster.refused(*SUBMIT) == (expected, f"launch.k8s: kubectl {verb}: {refusal}")
    assert "delete" not in {each[2] for each in cluster.calls()}


def test_why_a_submission_failed_is_said_also_where_it_cannot_be_taken_back(
    cluster: Cluster,
) -> None:
    refusal = "Error from server (Forbidden): no rights to %s"
    for verb in ("patch", "delete"):
        (cluster.folder / f"refuse-{verb}").write_text(refusal % verb)
    ended = cluster.run(*SUBMIT)
    warning, line = ended.stderr.splitlines()
    assert warning.startswith("warning: Job mine is left: ")
    assert warning.endswith("python -m launch.k8s cancel mine")
    assert (ended.returncode, line.endswith("no rights to patch")) == (64, True), line


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        (["FailureTarget"], "failing"),
        (["FailureTarget", "Failed"], "failed"),
        (["SuccessCriteriaMet"], "completing"),
        (["Complete", "SuccessCriteriaMet"], "complete"),
        (["Suspended"], "suspended"),
    ],
)
def test_the_state_of_a_job_is_the_condition_that_says_most(
    cluster: Cluster, conditions: list[str], state: str
) -> None:
    cluster.submit()
    told = [{"type": each, "status": "True", "reason": f"R{each}"} for each in conditions]
    past = {"type": "Suspended", "status": "False", "reason": "JobResumed"}
    cluster.edit("job", "mine", status={"conditions": [past, *told]})
    shown = json.loads(cluster.told("status", "mine", "--json"))
    said = {"failed": "RFailed", "complete": "RComplete"}.get(state, f"R{conditions[0]}")
    assert (shown["state"], shown["reason"]) == (state, said)


def test_a_job_that_is_being_deleted_still_has_the_run(cluster: Cluster) -> None:
    cluster.submit()
    job = cluster.object("job", "mine")
    job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    cluster.put(job)
    code, line = cluster.refused(*SUBMIT)
    assert (code, "Job mine has it and is being deleted" in line) == (76, True), line


def test_scale_changes_all_three_numbers_at_once_within_the_submission(cluster: Cluster) -> None:
    cluster.submit()
    assert cluster.told("scale", "mine", "--nodes=3") == "mine: 3 pods"
    spec = cluster.object("job", "mine")["spec"]
    assert (spec["completions"], spec["parallelism"], spec["maxFailedIndexes"]) == (3, 3, 1)
    assert sum(each[2] == "patch" for each in cluster.calls()) == 2
    for nodes in ("1", "5"):
        code, line = cluster.refused("scale", "mine", f"--nodes={nodes}")
        assert code == 64
        assert f"flag --nodes: found {nodes}, expected 2 to 4" in line


def test_suspend_resume_and_cancel(cluster: Cluster) -> None:
    cluster.submit()
    assert cluster.told("suspend", "mine") == "mine: suspended"
    assert cluster.object("job", "mine")["spec"]["suspend"] is True
    assert cluster.told("resume", "mine") == "mine: goes on"
    assert cluster.object("job", "mine")["spec"]["suspend"] is False
    assert RUN_DIR in cluster.told("cancel", "mine")
    assert cluster.names("job") == cluster.names("service") == cluster.names("deployment") == []
    assert cluster.names("serviceaccount") == ["fmnist-dist"]
    code, line = cluster.refused("suspend", "mine")
    assert (code, line) == (
        64,
        "launch.k8s: run mine: there is no such Job in namespace fmnist-dist, found none of ours",
    )


class Ends:
    """A kubelet whose pods have all ended as a table says; without an entry they run on."""

    def __init__(self, codes: dict[int, Ended]) -> None:
        self._codes = codes
        self._stopped: list[Pod] = []

    def start(self, pod: Pod) -> None:
        pass

    def end_of(self, pod: Pod) -> Ended | None:
        return Ended(143) if pod in self._stopped else self._codes.get(pod.index)

    def stop(self, pod: Pod) -> None:
        self._stopped.append(pod)


def happens(cluster: Cluster, codes: dict[int, Ended], *, seconds: int = 86400) -> None:
    """Let the model of the Job controller run on what was submitted; show what it comes to."""
    controller = JobController(cluster.object("job", "mine"), Ends(codes))
    for now in range(0, seconds, 60):
        controller.sync(now)
    cluster.put(job_document(controller))
    for pod in pod_documents(controller):
        pod["metadata"]["labels"] = {"batch.kubernetes.io/job-name": "mine"}
        cluster.put(pod)


POST_MORTEM = json.dumps({"reason": "another seed", "exit_code": 78, "fault": "the configuration"})


@pytest.mark.parametrize(
    ("codes", "expected", "said"),
    [
        ({0: Ended(0)}, 0, "mine: finished"),
        ({1: Ended(78, message=POST_MORTEM)}, 78, "78 (INCOMPATIBLE); PodFailurePolicy: Container"),
        ({2: Ended(70)}, 70, "failed with exit code 70 (NO_PROGRESS)"),
        (dict.fromkeys(range(4), Ended(75)), 75, "MaxFailedIndexesExceeded"),
        (dict.fromkeys(range(4), Ended(137)), 137, "failed with exit code 137; "),
    ],
)
def test_wait_ends_with_the_code_of_the_training(
    cluster: Cluster, codes: dict[int, Ended], expected: int, said: str
) -> None:
    cluster.submit()
    happens(cluster, codes)
    ended = cluster.run("wait", "mine", "--timeout=1")
    assert ended.returncode == expected, ended.stderr
    assert said in ended.stdout + ended.stderr
    if expected == 78:
        assert "another seed" in ended.stderr


def test_wait_goes_on_where_the_cluster_does_not_answer_for_a_moment(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.submit()
    refusal = cluster.folder / "refuse-get"
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 1:  # after the first answer
            refusal.write_text("The connection to the server 10.0.0.1:6443 was refused")
        elif len(pauses) == 3:
            refusal.unlink()
            happens(cluster, {0: Ended(0)})

    # Of this module alone: `subprocess` sleeps too.
    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    monkeypatch.setattr("launch.k8s.status.time", clock)
    ended = cluster.run("wait", "mine", "--timeout=60")
    assert (ended.returncode, ended.stdout) == (0, "mine: finished\n")
    assert ended.stderr.count("no cluster answers") == 2


@pytest.mark.parametrize("uid", [None, "another"])
def test_wait_ends_where_the_job_is_deleted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, uid: str | None
) -> None:
    cluster.submit()
    job = cluster.object("job", "mine")

    def sleep(_: float) -> None:
        (cluster.folder / NAMESPACE / "job" / "mine.json").unlink()
        if uid is not None:  # submitted again at once
            cluster.put({**job, "metadata": {**job["metadata"], "uid": uid}})

    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    monkeypatch.setattr("launch.k8s.status.time", clock)
    code, line = cluster.refused("wait", "mine")
    assert code == 143
    assert line.endswith(
        f"was deleted before it had ended; the same submission goes on with {RUN_DIR}"
    )


def test_waiting_for_a_cluster_that_is_away_has_the_same_limit(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.submit()
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        (cluster.folder / "refuse-get").write_text("Unable to connect to the server: EOF")

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now[0])
    monkeypatch.setattr("launch.k8s.status.time", clock)
    ended = cluster.run("wait", "mine", "--timeout=5")
    assert (ended.returncode, "no cluster answers" in ended.stderr.splitlines()[-1]) == (75, True)
    assert now[0] <= 10


def test_wait_has_a_limit_where_it_was_given_one(cluster: Cluster) -> None:
    cluster.submit()
    assert cluster.refused("wait", "mine", "--timeout=0.1") == (
        75,
        "launch.k8s: mine: still running after 0.1 s",
    )


def test_status_shows_the_job_its_pods_and_why_the_run_cannot_be_read(cluster: Cluster) -> None:
    cluster.submit()
    happens(cluster, {1: Ended(78, message=POST_MORTEM)})
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "nobody"}
    shown = cluster.start("status", "mine", environ={**nobody, "AWS_SECRET_ACCESS_KEY": "nobody"})
    assert shown.returncode == 0, shown.stderr
    assert "mine (failed)" in shown.stdout
    assert "exit code 78 another seed" in shown.stdout
    assert f"{RUN_DIR} cannot be read from here" in shown.stdout


def test_status_joins_the_head_of_the_runs_log(cluster: Cluster, trained_run: Path) -> None:
    cluster.submit()
    job = cluster.object("job", "mine")
    job["metadata"]["annotations"]["fmnist-dist/run-dir"] = str(trained_run)
    cluster.put(job)
    happens(cluster, {1: Ended(70)})
    told = json.loads(cluster.told("status", "mine", "--json"))
    assert told["state"] == "failed"
    assert [each["exit_code"] for each in told["ends"]].count(70) == 1
    told = json.loads(cluster.told("status", "mine", "--json"))
    assert (told["run"]["status"], told["run"]["step"]) == ("finished", 6)
    assert f"{trained_run} (finished, step 6)" in cluster.told("status", "mine")


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("The connection to the server 10.0.0.1:6443 was refused - did you specify", 75),
        ("Unable to connect to the server: net/http: TLS handshake timeout", 75),
        ('error: error validating "STDIN": Get "https://c": dial: connect: connection refused', 75),
        ("Error from server (ServiceUnavailable): the server is currently unable to handle", 75),
        ("Error from server (TooManyRequests): the server has received too many requests", 75),
        ("Error from server: etcdserver: leader changed", 75),
        ("Error from server (InternalError): failed calling webhook: no such host", 75),
        ('Error from server (Forbidden): jobs.batch is forbidden: User "u" cannot get', 64),
        ("error: You must be logged in to the server (Unauthorized)", 64),
        ('Error from server (BadRequest): admission webhook "w": proxy: no such host', 64),
    ],
)
def test_what_passes_is_told_from_what_is_refused(cluster: Cluster, said: str, code: int) -> None:
    (cluster.folder / "refuse-get").write_text(said)
    found, line = cluster.refused("status", "mine")
    assert found == code
    assert said in line
    assert ("no cluster answers" in line) == ("Error from server" not in said and code == 75)


def test_a_kubectl_that_cannot_be_started_is_one_line(cluster: Cluster) -> None:
    cluster.program.write_bytes(b"\x7fELF of another machine")
    ended = cluster.start("status", "mine", environ={"PATH": str(cluster.program.parent)})
    line = "launch.k8s: kubectl: cannot be started: Exec format error\n"
    assert (ended.returncode, ended.stderr) == (78, line)


def test_logs_of_no_run_are_refused(cluster: Cluster) -> None:
    code, line = cluster.refused("logs", "mien")
    assert (code, "run mien: there is no such Job in namespace" in line) == (64, True)


def test_logs_are_those_of_the_runs_trainers(cluster: Cluster) -> None:
    cluster.submit()
    shown = cluster.start("logs", "mine", "--index=2")  # kubectl writes to our output itself
    assert shown.returncode == 0, shown.stderr
    said = shown.stdout.strip()
    assert "fmnist-dist/run-id=mine,app.kubernetes.io/component=trainer" in said
    assert said.endswith("batch.kubernetes.io/job-completion-index=2")
    assert "--ignore-errors" in cluster.calls()[-1], "a pod without a node has no log yet"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--overlay=gke"], "flag --overlay: found gke, expected one of aks-spot, cpu-local, "),
        (["--run-dir=runs/mine"], "flag --run-dir: found 'runs/mine', expected the URL of an"),
        (["--run-dir=file:///runs/mine"], "flag --run-dir: found 'file:///runs/mine', expected"),
        (["--nodes=4:2"], "flag --nodes: found '4:2', expected MIN:MAX with MIN at most MAX"),
        (["--nodes=many"], "flag --nodes: found 'many', expected MIN:MAX, as in 2:8, or a number"),
        (["--nodes=2:9"], "flag --nodes: found 9 nodes of 1 workers, expected at most "),
        (["--gpus-per-node=4"], "flag --nodes: found 4 nodes of 4 workers, expected at most "),
        ([f"--run-id={'r' * 58}"], "(58 characters), expected at most 57: pods are called"),
        (["--run-id=My_Run"], "flag --run-id: found 'My_Run', expected lower-case letters, digits"),
        (["--with=gpuu"], "flag --with: found 'gpuu', expected one of gpu, "),
        (["--with=s3-irsa"], "flag --role-arn: found nothing, expected the role of the bucket"),
        (["--env=FMNIST_DIST_LRR=1"], "environment FMNIST_DIST_LRR: there is no such setting"),
        (["--env=nothing"], "flag --env: found 'nothing', expected KEY=VALUE"),
        (["--env=AWS_SECRET_ACCESS_KEY=hush"], "flag --env: AWS_SECRET_ACCESS_KEY is a secret: "),
        (["--env=RDZV_CONF=a=b"], "flag --env: RDZV_CONF is set by the manifest itself"),
        (["--env=FMNIST_DIST_CONFIG=pyproject.toml"], "FMNIST_DIST_CONFIG: the pods do not have"),
        (["--env=TORCH_ELASTIC_SHUTDOWN_TIMEOUT=soon"], "TIMEOUT is soon, expected whole seconds"),
        (["--env=AWS_ENDPOINT_URL=http://s3:x"], "AWS_ENDPOINT_URL: found 'http://***', expected"),
        (["--env=AWS_ENDPOINT_URL=s3:8333"], "AWS_ENDPOINT_URL: found 's3:8333', expected http"),
        (["--with=kueue"], "flag --queue: found nothing, expected the name of Kueue's queue"),
        (["--role-arn=arn:aws:iam::1:role/r"], "flag --role-arn: nothing takes a role, expected "),
        (["--namespace=My_Space"], "flag --namespace: found 'My_Space', expected lower-case"),
        (["--run-dir=memory://runs/mine"], "flag --run-dir: found 'memory://runs/mine', expected"),
        (["--imagee=x"], "flag --imagee: there is no such flag; did you mean --image?"),
        (["--", "--lrr=1"], "flag --lrr: there is no such flag; did you mean --lr?"),
        (["--", "--lr=fast"], "flag --lr: found 'fast', expected a number above 0"),
        (["--", "--config=a.toml"], "flag --config: the pods do not have this file"),
        (["--", "--drain-seconds=20"], "grace 15 s, shutdown 10 s, drain 20 s: expected each"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sent(
    cluster: Cluster, changed: list[str], said: str
) -> None:
    flag = changed[0].partition("=")[0]
    code, line = cluster.refused(*[e for e in SUBMIT if e.partition("=")[0] != flag], *changed)
    assert (code, said in line) == (64, True), line
    assert not (cluster.folder / "calls").exists()


def test_an_image_without_digest_is_warned_of(cluster: Cluster) -> None:
    words = [*(each for each in SUBMIT if "--image" not in each), "--image=fmnist-dist:latest"]
    ended = cluster.run(*words)
    assert ended.returncode == 0
    assert ended.stderr.splitlines() == [
        "warning: image fmnist-dist:latest has no digest: pods that start later may run another one"
    ]


def test_without_kubectl_or_without_a_cluster_it_is_one_line(
    cluster: Cluster, tmp_path: Path
) -> None:
    ended = cluster.start("status", "mine", environ={"PATH": str(tmp_path)})
    assert ended.returncode == 78
    assert "kubectl: found no such program on PATH" in ended.stderr
    cluster.program.unlink()  # the real one, which knows of no cluster
    ended = cluster.start("status", "mine", environ={"KUBECONFIG": str(tmp_path / "none")})
    assert (ended.returncode, len(ended.stderr.splitlines())) == (75, 1)
    assert "no cluster answers" in ended.stderr


def test_the_commands_of_the_manual_are_ours(cluster: Cluster) -> None:
    manual = (ROOT / "k8s" / "README.md").read_text()
    lines = manual.partition("```sh\n")[2].partition("```")[0].splitlines()
    assert len(lines) == 5, "from an image and a bucket to a run"
    for line in lines[1:]:
        words = shlex.split(line.replace("sha256:…", f"sha256:{'a' * 64}"))
        assert words[:3] == ["python", "-m", "launch.k8s"]
        if words[3] == "wait":
            cluster.edit("job", "mine", status={"conditions": [COMPLETE]})
        told = cluster.start(*words[3:], environ={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"})
        assert told.returncode == 0, told.stderr


def test_render_prints_what_submit_would_send(cluster: Cluster) -> None:
    words = [
        "render",
        *SUBMIT[1:],
        "--env=AWS_REGION=eu-central-1",
        "--env=AWS_ENDPOINT_URL=http://s3:8333",
    ]
    documents = list(yaml.safe_load_all(cluster.told(*words, "--", "--epochs", "3")))
    job = next(each for each in documents if each["kind"] == "Job")
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[:2] == ["--nnodes=2:4", "--nproc-per-node=1"]
    assert args[-3:] == [f"--run-dir={RUN_DIR}", "--epochs", "3"]
    settings = next(each for each in documents if each["kind"] == "ConfigMap")
    assert settings["data"]["AWS_REGION"] == "eu-central-1"
    policy = next(each for each in documents if each["kind"] == "NetworkPolicy")
    assert {"ports": [{"port": 8333, "protocol": "TCP"}]} in policy["spec"]["egress"]
    assert not (cluster.folder / "calls").exists()


def test_gpus_bring_their_component_and_as_many_workers(cluster: Cluster) -> None:
    words = ["render", *(e for e in SUBMIT[1:] if "nodes" not in e), "--nodes=1:2"]
    documents = list(yaml.safe_load_all(cluster.told(*words, "--gpus-per-node=4")))
    job = next(each for each in documents if each["kind"] == "Job")
    pod_spec = job["spec"]["template"]["spec"]
    container = pod_spec["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert "--nproc-per-node=4" in container["args"]
    assert "nvidia.com/gpu" in {each.get("key") for each in pod_spec["tolerations"]}


def test_an_overlay_of_the_users_own_is_a_folder_and_keeps_the_rules(
    cluster: Cluster, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    base = os.path.relpath(ROOT / "k8s" / "overlays" / "cpu-local", own.resolve())
    wild = [
        {"op": "add", "path": "/spec/template/spec/tolerations/-", "value": {"operator": "Exists"}}
    ]
    wanted: dict[str, Any] = {"resources": [base]}
    (own / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    words = [f"--overlay={own}" if "--overlay" in each else each for each in SUBMIT]
    cluster.told("render", *words[1:])
    wanted["patches"] = [{"target": {"kind": "Job"}, "patch": yaml.safe_dump(wild)}]
    (own / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    code, line = cluster.refused("render", *words[1:])
    assert code == 64
    assert line.endswith("Job mine tolerates every taint, which also exempts it from being drained")


def test_what_an_overlay_brings_besides_stays_as_it_is(cluster: Cluster, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    base = os.path.relpath(ROOT / "k8s" / "overlays" / "cpu-local", own.resolve())
    more = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "dashboards"}}
    (own / "more.yaml").write_text(yaml.safe_dump(more))
    proxy = {
        "name": "proxy",
        "image": f"registry/proxy@sha256:{'b' * 64}",
        "ports": [{"containerPort": 8080}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    path = "/spec/template/spec/containers"
    changes = [
        {"op": "add", "path": f"{path}/-", "value": proxy},
        {"op": "add", "path": f"{path}/0/envFrom/-", "value": {"secretRef": {"name": "s3"}}},
    ]
    wanted = {
        "resources": [base, "more.yaml"],
        "patches": [{"target": {"kind": "Job"}, "patch": yaml.safe_dump(changes)}],
    }
    (own / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    words = [f"--overlay={own}" if "--overlay" in each else each for each in SUBMIT[1:]]
    text = cluster.told("render", *words, "--env=AWS_REGION=eu-central-1")
    documents = list(yaml.safe_load_all(text))
    job = next(each for each in documents if each["kind"] == "Job")
    trainer, beside = job["spec"]["template"]["spec"]["containers"]
    assert (trainer["image"], beside) == (IMAGE, proxy)
    assert trainer["envFrom"][1:] == [{"secretRef": {"name": "s3"}}]
    maps = {e["metadata"]["name"]: e.get("data") for e in documents if e["kind"] == "ConfigMap"}
    assert maps["dashboards"] is None
    assert maps["mine-settings"]["AWS_REGION"] == "eu-central-1"


def test_the_stand_in_refuses_what_the_api_server_refuses(cluster: Cluster) -> None:
    """Else `scale` could patch one number, and `submit` overwrite a Job, without being noticed."""
    cluster.submit()

    def kubectl(*words: str, sent: str = "") -> str:
        done = subprocess.run(
            [str(cluster.program), "--namespace", NAMESPACE, *words],
            env=cluster.environ(),
            input=sent,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        return done.stderr

    one = json.dumps({"spec": {"completions": 3}})
    assert "in tandem" in kubectl("patch", "job", "mine", "--type=merge", "--patch", one)
    other = json.dumps({"spec": {"template": {}}})
    assert "immutable" in kubectl("patch", "job", "mine", "--type=merge", "--patch", other)
    again = json.dumps(cluster.object("job", "mine"))
    assert "AlreadyExists" in kubectl("create", "--filename", "-", sent=again)
