"""World, process group and the reduction that gives the same bits at every world size."""
