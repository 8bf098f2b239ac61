-- Histories are keyless and partitioned by the day of received_at, which is the platform's clock: a device
-- with a wrong clock makes no partitions. COPY appends to them; the offset beside them keeps rows single.
CREATE TABLE reading (
    site_id     text COLLATE "C" NOT NULL,
    device_id   text COLLATE "C" NOT NULL,
    epoch       bigint,
    seq         bigint,
    name        text COLLATE "C" NOT NULL,
    number      double precision,
    text        text,
    flag        boolean,
    unit        text,
    occurred_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL,
    message_id  uuid NOT NULL,
    trace_id    text COLLATE "C" NOT NULL,
    stream      text COLLATE "C" NOT NULL
) PARTITION BY RANGE (received_at);
CREATE INDEX reading_occurred_at ON reading USING brin (occurred_at);
CREATE TABLE reading_default PARTITION OF reading DEFAULT;

CREATE TABLE session (
    site_id            text COLLATE "C" NOT NULL,
    device_id          text COLLATE "C" NOT NULL,
    client_id          text COLLATE "C" NOT NULL,
    event              text NOT NULL,
    cause              text,
    protocol           text NOT NULL,
    session_generation bigint NOT NULL,
    occurred_at        timestamptz NOT NULL,
    received_at        timestamptz NOT NULL,
    message_id         uuid NOT NULL,
    trace_id           text COLLATE "C" NOT NULL
) PARTITION BY RANGE (received_at);
-- Sessions are few, and the newest of a device is asked for: a btree pays here.
CREATE INDEX session_device ON session (site_id, device_id, received_at);
CREATE TABLE session_default PARTITION OF session DEFAULT;

CREATE TABLE alert (
    alert_id     text COLLATE "C" PRIMARY KEY,
    rule_id      text COLLATE "C" NOT NULL,
    rule_version bigint NOT NULL,
    site_id      text COLLATE "C" NOT NULL,
    device_id    text COLLATE "C" NOT NULL,
    severity     text NOT NULL,
    state        text NOT NULL,
    raised_at    timestamptz NOT NULL,
    cleared_at   timestamptz,
    summary      text NOT NULL,
    message_id   uuid NOT NULL,
    trace_id     text COLLATE "C" NOT NULL,
    received_at  timestamptz NOT NULL,
    CONSTRAINT alert_state_is_known CHECK (state IN ('raised', 'cleared')),
    CONSTRAINT alert_cleared_has_its_time CHECK ((state = 'cleared') = (cleared_at IS NOT NULL))
);
CREATE INDEX alert_device ON alert (site_id, device_id, raised_at);

CREATE TABLE twin (
    site_id          text COLLATE "C" NOT NULL,
    device_id        text COLLATE "C" NOT NULL,
    reported_version bigint NOT NULL,
    desired_version  bigint NOT NULL,
    presence         text NOT NULL,
    last_seen_at     timestamptz NOT NULL,
    -- json, not jsonb: the document reads back as it was written, on both stores.
    document         json NOT NULL,
    message_id       uuid NOT NULL,
    trace_id         text COLLATE "C" NOT NULL,
    PRIMARY KEY (site_id, device_id)
) WITH (fillfactor = 80);

-- One row a group and partition. cluster_id and topic_id are the incarnation that `next` counts in.
CREATE TABLE stage_offset (
    consumer_group text COLLATE "C" NOT NULL,
    topic          text COLLATE "C" NOT NULL,
    partition      integer NOT NULL,
    cluster_id     text COLLATE "C" NOT NULL,
    topic_id       text COLLATE "C" NOT NULL,
    next           bigint NOT NULL,
    books          text NOT NULL,
    updated_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer_group, topic, partition)
) WITH (fillfactor = 50);
