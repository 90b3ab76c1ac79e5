"""What must hold in a manifest beyond its schema: one function for each rule.

A rule yields a line for each violation: what was found, what is expected. They run on what is
rendered, and `doctor` runs them on what the cluster holds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from launch.k8s.manifest import Manifest
from launch.k8s.rules import ends, network, pods, sizes, spot

Rule = Callable[[Manifest], Iterator[str]]
RULES: tuple[Rule, ...] = (
    ends.never_restarts,
    ends.replaces_only_what_has_ended,
    ends.codes_are_sorted_and_unique,
    ends.no_rule_is_for_success,
    ends.codes_name_their_container,
    ends.codes_are_those_of_the_table,
    ends.own_faults_come_before_disruptions,
    ends.disruptions_are_free,
    ends.retries_are_counted_per_index,
    ends.one_success_ends_the_job,
    sizes.completions_equal_parallelism,
    sizes.is_indexed,
    sizes.fails_when_the_smallest_world_is_out_of_reach,
    sizes.host_names_fit,
    sizes.ports_agree,
    sizes.limits_are_nested,
    sizes.variables_are_defined_before_their_use,
    network.services_select_the_pods,
    network.subdomain_is_a_headless_service,
    network.rendezvous_leads_to_its_store,
    network.policies_cover_the_pods,
    network.only_the_run_reaches_the_pods,
    network.storage_is_reachable,
    spot.grace_fits_the_notice,
    spot.spot_taints_are_tolerated,
    spot.no_toleration_is_a_wildcard,
    spot.lost_nodes_are_left_soon,
    spot.nothing_delays_the_notice,
    spot.the_store_stays_off_spot_nodes,
    spot.the_store_is_in_no_spot_pod,
    pods.image_by_digest,
    pods.the_store_is_not_shared,
    pods.service_links_are_off,
    pods.pods_are_restricted,
    pods.scratch_is_limited,
)


_UNWISE = {pods.image_by_digest, spot.the_store_is_in_no_spot_pod}


@dataclass(frozen=True, slots=True)
class Problem:
    """One violation of one rule."""

    rule: str
    line: str
    is_warning: bool  # unwise rather than wrong

    def __str__(self) -> str:
        return self.line


def check(manifest: Manifest) -> list[Problem]:
    """Return every violation of every rule, in the rules' order."""
    return [
        Problem(rule.__name__, line, is_warning=rule in _UNWISE)
        for rule in RULES
        for line in rule(manifest)
    ]
