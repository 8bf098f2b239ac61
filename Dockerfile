# syntax=docker/dockerfile:1

# The build: the compiler that Cargo.toml asks for, and what librdkafka, OpenSSL and SQLite are compiled with.
FROM rust:1.95-bookworm AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential perl pkg-config \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# The caches live outside the image, so that a second build compiles only what changed; hence the copy.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --package throughline-platform \
 && install -D --strip target/release/throughline /out/throughline

# The image: one binary, which is every role (`throughline run ROLE`) and every command.
FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin throughline
COPY --from=build /out/throughline /usr/local/bin/throughline
# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
# Metrics and health; MQTT.
EXPOSE 9464 1883
# No init process is needed: the program starts no children in these roles and handles SIGTERM itself.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/throughline"]
CMD ["--help"]
