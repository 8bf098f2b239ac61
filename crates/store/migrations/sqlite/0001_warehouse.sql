-- Times are integer microseconds since 1970 (UTC) and flags 0 or 1 in the tables named *_data. The views
-- without the suffix have the columns that the PostgreSQL tables have, times as ISO 8601 text in UTC with
-- six decimals, whose order as text is the order in time. Filter large ranges on the *_data tables.
CREATE TABLE reading_data (
    site_id     TEXT NOT NULL,
    device_id   TEXT NOT NULL,
    epoch       INTEGER,
    seq         INTEGER,
    name        TEXT NOT NULL,
    number      REAL,
    text        TEXT,
    flag        INTEGER,
    unit        TEXT,
    occurred_at INTEGER NOT NULL,
    received_at INTEGER NOT NULL,
    message_id  TEXT NOT NULL,
    trace_id    TEXT NOT NULL,
    stream      TEXT NOT NULL
) STRICT;
CREATE VIEW reading AS SELECT
    site_id, device_id, epoch, seq, name, number, text, flag, unit,
    strftime('%Y-%m-%dT%H:%M:%S', (occurred_at - (occurred_at % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (occurred_at % 1000000 + 1000000) % 1000000) AS occurred_at,
    strftime('%Y-%m-%dT%H:%M:%S', (received_at - (received_at % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (received_at % 1000000 + 1000000) % 1000000) AS received_at,
    message_id, trace_id, stream
FROM reading_data;

CREATE TABLE session_data (
    site_id            TEXT NOT NULL,
    device_id          TEXT NOT NULL,
    client_id          TEXT NOT NULL,
    event              TEXT NOT NULL,
    cause              TEXT,
    protocol           TEXT NOT NULL,
    session_generation INTEGER NOT NULL,
    occurred_at        INTEGER NOT NULL,
    received_at        INTEGER NOT NULL,
    message_id         TEXT NOT NULL,
    trace_id           TEXT NOT NULL
) STRICT;
CREATE INDEX session_device ON session_data (site_id, device_id, received_at);
CREATE VIEW session AS SELECT
    site_id, device_id, client_id, event, cause, protocol, session_generation,
    strftime('%Y-%m-%dT%H:%M:%S', (occurred_at - (occurred_at % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (occurred_at % 1000000 + 1000000) % 1000000) AS occurred_at,
    strftime('%Y-%m-%dT%H:%M:%S', (received_at - (received_at % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (received_at % 1000000 + 1000000) % 1000000) AS received_at,
    message_id, trace_id
FROM session_data;

CREATE TABLE alert_data (
    alert_id     TEXT NOT NULL PRIMARY KEY,
    rule_id      TEXT NOT NULL,
    rule_version INTEGER NOT NULL,
    site_id      TEXT NOT NULL,
    device_id    TEXT NOT NULL,
    severity     TEXT NOT NULL,
    state        TEXT NOT NULL,
    raised_at    INTEGER NOT NULL,
    cleared_at   INTEGER,
    summary      TEXT NOT NULL,
    message_id   TEXT NOT NULL,
    trace_id     TEXT NOT NULL,
    received_at  INTEGER NOT NULL,
    CONSTRAINT alert_state_is_known CHECK (state IN ('raised', 'cleared')),
    CONSTRAINT alert_cleared_has_its_time CHECK ((state = 'cleared') = (cleared_at IS NOT NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX alert_device ON alert_data (site_id, device_id, raised_at);
CREATE VIEW alert AS SELECT
    alert_id, rule_id, rule_version, site_id, device_id, severity, state,
    strftime('%Y-%m-%dT%H:%M:%S', (raised_at - (raised_at % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (raised_at % 1000000 + 1000000) % 1000000) AS raised_at,
    strftime('%Y-%m-%dT%H:%M:%S', (cleared_at - (cleared_at % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (cleared_at % 1000000 + 1000000) % 1000000) AS cleared_at,
    summary, message_id, trace_id,
    strftime('%Y-%m-%dT%H:%M:%S', (received_at - (received_at % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (received_at % 1000000 + 1000000) % 1000000) AS received_at
FROM alert_data;

CREATE TABLE twin_data (
    site_id          TEXT NOT NULL,
    device_id        TEXT NOT NULL,
    reported_version INTEGER NOT NULL,
    desired_version  INTEGER NOT NULL,
    presence         TEXT NOT NULL,
    last_seen_at     INTEGER NOT NULL,
    document         TEXT NOT NULL,
    message_id       TEXT NOT NULL,
    trace_id         TEXT NOT NULL,
    PRIMARY KEY (site_id, device_id),
    CONSTRAINT twin_document_is_json CHECK (json_valid(document))
) STRICT, WITHOUT ROWID;
CREATE VIEW twin AS SELECT
    site_id, device_id, reported_version, desired_version, presence,
    strftime('%Y-%m-%dT%H:%M:%S', (last_seen_at - (last_seen_at % 1000000 + 1000000) % 1000000) / 1000000, 'unixepoch')
        || printf('.%06dZ', (last_seen_at % 1000000 + 1000000) % 1000000) AS last_seen_at,
    document, message_id, trace_id
FROM twin_data;

-- One row a group and partition. cluster_id and topic_id are the incarnation that `next` counts in.
CREATE TABLE stage_offset (
    consumer_group TEXT NOT NULL,
    topic          TEXT NOT NULL,
    partition      INTEGER NOT NULL,
    cluster_id     TEXT NOT NULL,
    topic_id       TEXT NOT NULL,
    next           INTEGER NOT NULL,
    books          TEXT NOT NULL,
    updated_at     INTEGER NOT NULL DEFAULT (CAST(unixepoch('subsec') * 1000000 AS INTEGER)),
    PRIMARY KEY (consumer_group, topic, partition)
) STRICT, WITHOUT ROWID;
