"""What the API server would show of a modelled Job and its pods, for the code that reads it."""

from typing import Any

from launch.k8s.controller import JobController, Pod


def job_document(controller: JobController) -> dict[str, Any]:
    conditions = [each for each in (controller.target, controller.condition) if each is not None]
    return {
        **controller.job,
        "status": {
            "active": sum(pod.is_active for pod in controller.pods),
            "terminating": sum(pod.is_terminating for pod in controller.pods),
            "failed": controller.counted,
            "succeeded": len(controller.succeeded),
            "completedIndexes": ",".join(map(str, sorted(controller.succeeded))),
            "failedIndexes": ",".join(map(str, sorted(controller.failed))),
            "conditions": [
                {"type": kind, "status": "True", "reason": reason, "message": message}
                for kind, reason, message in conditions
            ],
        },
    }


def pod_documents(controller: JobController) -> list[dict[str, Any]]:
    """Return the pods that are still there."""
    container = controller.spec["template"]["spec"]["containers"][0]["name"]
    return [_pod_document(pod, container) for pod in controller.pods]


def _pod_document(pod: Pod, container: str) -> dict[str, Any]:
    state: dict[str, Any] = {"running": {}}
    status: dict[str, Any] = {"phase": "Running"}
    if pod.ended is not None:
        at = f"2026-01-01T00:00:00Z+{pod.ended_at:012.1f}"
        ended = {"exitCode": pod.ended.code, "message": pod.ended.message, "finishedAt": at}
        state, status["phase"] = {"terminated": ended}, "Failed" if pod.is_failed else "Succeeded"
        if pod.ended.disrupted:
            status["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod.name, "labels": {}},
        "spec": {},
        "status": {**status, "containerStatuses": [{"name": container, "state": state}]},
    }
