"""Renders, submits and watches the Jobs of `k8s/`; all that talks to a cluster is kubectl."""
