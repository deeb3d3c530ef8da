# The command-line tool in a small image: see docs/deployment.md.
#
#   docker build --tag shardlock .

FROM rust:1.88-slim-bookworm AS build
WORKDIR /source
# To build with etcd, which needs protoc: --build-arg FEATURES=etcd
ARG FEATURES=
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libprotobuf-dev protobuf-compiler \
    && rm -rf /var/lib/apt/lists/*
COPY . .
RUN cargo build --locked --profile dist --package shardlock-cli --features "$FEATURES"

FROM debian:bookworm-slim
# The authorities that sign the certificates of servers (rediss:// without tls_ca).
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /source/target/dist/shardlock /usr/bin/shardlock
# No user of the system has this number.
USER 65532:65532
ENTRYPOINT ["shardlock"]
