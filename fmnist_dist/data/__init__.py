"""The data set, from wherever it can be had, to normalised batches on the device."""
