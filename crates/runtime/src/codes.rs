//! The stable codes of errors that a person must act on. `throughline explain <code>` prints them.

/// A code with what it means and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code {
    /// `TL-<AREA>-<number>`; never reused for something else.
    pub id: &'static str,
    /// One line.
    pub title: &'static str,
    /// What happened and why the stage does not go on by itself.
    pub explanation: &'static str,
    /// The command that helps and what it does.
    pub remedy: &'static str,
}

/// Offsets or state belong to a cluster or topic that was replaced.
pub const REPLACED: &str = "TL-KAFKA-011";
/// A committed offset carries metadata that the stage did not write.
pub const FOREIGN_OFFSET: &str = "TL-KAFKA-012";
/// The changelog holds something that is not a state of the stage.
pub const STATE_UNREADABLE: &str = "TL-STATE-001";
/// A state does not fit its schema.
pub const STATE_UNWRITABLE: &str = "TL-STATE-002";
/// There is state, but no position that it belongs to.
pub const STATE_WITHOUT_POSITION: &str = "TL-STATE-003";
/// A stage emitted a value that does not fit its topic's schema.
pub const OUTPUT_INVALID: &str = "TL-STAGE-001";
/// A timer that fired is still due.
pub const TIMER_STUCK: &str = "TL-STAGE-002";
/// The source delivered a topic that the stage does not read.
pub const TOPIC_UNEXPECTED: &str = "TL-STAGE-003";
/// A failure that the policy does not name.
pub const UNFORESEEN: &str = "TL-STAGE-004";
/// A store refused a write that holds no rows.
pub const STORE_REFUSES_NOTHING: &str = "TL-STORE-009";
/// The database stands before what it had once taken.
pub const STORE_FELL_BACK: &str = "TL-STORE-010";

/// Every code, in order of its id.
pub const CODES: &[Code] = &[
    Code {
        id: "TL-KAFKA-001",
        title: "the Kafka client refuses its configuration",
        explanation: "A property of the client is unknown or has a value that it does not take.",
        remedy: "The message names the property; correct it in the configuration's Kafka section.",
    },
    Code {
        id: "TL-KAFKA-002",
        title: "the Kafka cluster refuses this client",
        explanation: "Authentication or authorisation failed, or the cluster is too old for what the stage \
                      needs. Waiting would not change it.",
        remedy: "The message holds the broker's answer; give the client that right, or correct user and \
                 password in the configuration's Kafka section.",
    },
    Code {
        id: "TL-KAFKA-003",
        title: "a record is larger than its topic takes",
        explanation: "An output or a state is beyond `max.message.bytes` of its topic, so its transaction \
                      can never be committed.",
        remedy: "Raise `max.message.bytes` of the topic that the message names, or find out why the record \
                 grew with `throughline tap <topic>`.",
    },
    Code {
        id: "TL-KAFKA-004",
        title: "Kafka refused an administrative request",
        explanation: "Creating or changing a topic, or reading about one, was refused for good.",
        remedy: "The message holds Kafka's reason; `throughline topics plan` shows what was to be done.",
    },
    Code {
        id: "TL-KAFKA-010",
        title: "a position does not exist any more",
        explanation: "The topic was made anew under the same name, or a broker came back with less than it \
                      had acknowledged. Going on would skip or repeat records, so the stage stops.",
        remedy: "Stop the stage's members. `throughline groups adopt <group> --begin earliest` (repeats are \
                 possible) or `--begin end` (what is there is skipped) shows what it would do, and does it \
                 with `--yes`.",
    },
    Code {
        id: REPLACED,
        title: "offsets or state belong to another cluster or to a topic that is gone",
        explanation: "A topic, or the changelog that held the state, was deleted and made anew under the same \
                      name, or the address leads to another Kafka cluster. An offset of before says nothing \
                      about what is there now, so going on would skip or repeat records, or decide without \
                      the state. The commit metadata of every offset names cluster, topic and changelog.",
        remedy: "Where the address is wrong, correct it. Else stop the stage's members; `throughline groups \
                 adopt <group> --begin earliest` (nothing is skipped, repeats are possible), `--begin end` \
                 (what is there is skipped) or `--begin here` (the offset still fits: only the state was \
                 lost, say) shows what it would do, and does it with `--yes`.",
    },
    Code {
        id: FOREIGN_OFFSET,
        title: "a committed offset was moved by a foreign tool",
        explanation: "The offset of a consumer group carries no books of ours, or books of an unknown \
                      version: kafka-consumer-groups, a console or another program moved it. Counting on \
                      from it would make the books lie about what was processed, so the stage stops.",
        remedy: "Stop the stage's members. `throughline groups adopt <group>` shows what accepting the \
                 position would do; with `--yes` it accepts it and opens a new, named volume of the books. \
                 Where it is higher than before, accepting skips what lies between: the position of before \
                 is in the history of `kafka_consumergroup_group_offset`. To reject it, put the offset back \
                 with the tool that moved it, then adopt.",
    },
    Code {
        id: "TL-REGISTRY-001",
        title: "the schema registry refused a request",
        explanation: "The registry answered, and its answer was no: a schema that breaks readers, a subject \
                      or login that it does not accept. Asking again would give the same answer.",
        remedy: "The message holds the registry's reason. `throughline topics plan` shows what the catalog \
                 wants to register; `throughline doctor` checks address and login.",
    },
    Code {
        id: OUTPUT_INVALID,
        title: "a stage emitted a value that does not fit its topic's schema",
        explanation: "This is a defect of the stage or a topic that is not bound to its schema. Nothing of \
                      the transaction was committed.",
        remedy: "`throughline topics plan` shows whether a schema is missing; `throughline topics apply` \
                 registers it. Otherwise report the defect with the message.",
    },
    Code {
        id: TIMER_STUCK,
        title: "a timer that fired is still due",
        explanation: "After a timer fired, the state's next due time must be later. It is not, so the stage \
                      would fire for ever. This is a defect of the stage.",
        remedy: "Report the defect with the message; the previous version of the stage can take over, \
                 nothing of the transaction was committed.",
    },
    Code {
        id: TOPIC_UNEXPECTED,
        title: "a partition was offered of a topic that the stage does not read",
        explanation: "Another program uses the stage's consumer group with other topics, or the members \
                      run different versions.",
        remedy: "`kafka-consumer-groups --describe --members --verbose --group <group>` lists the members and \
                 what they have; stop the one that does not belong.",
    },
    Code {
        id: UNFORESEEN,
        title: "a failure that the policy does not name",
        explanation: "`throughline policy` lists what is done about each failure. This one is in no line of \
                      it, so neither waiting nor a dead letter is known to be right. This is a defect of an \
                      adapter.",
        remedy: "Report the defect with the message; nothing of the transaction was committed.",
    },
    Code {
        id: STATE_UNREADABLE,
        title: "a changelog holds something that is not a state of the stage",
        explanation: "Another program wrote to the changelog topic, or a newer version of the stage did. \
                      Going on without that state would repeat or lose effects.",
        remedy: "Run the newest version that wrote it. If a foreign record is the cause, write a tombstone \
                 under its key; the message names partition and offset.",
    },
    Code {
        id: STATE_UNWRITABLE,
        title: "a state does not fit its schema",
        explanation: "This is a defect of the stage. Nothing of the transaction was committed.",
        remedy: "Report the defect with the message; the previous version of the stage can take over.",
    },
    Code {
        id: STATE_WITHOUT_POSITION,
        title: "a changelog holds state, but the group has no committed offset",
        explanation: "The broker forgot the group's offsets: its inputs were deleted (and made anew), the group \
                      was deleted, or had no members for longer than `offsets.retention.minutes`. Beginning \
                      at the earliest record would repeat those that have no sequence identity.",
        remedy: "Stop the stage's members. `throughline groups adopt <group> --begin earliest` (nothing is \
                 skipped; right after a topic was made anew) or `--begin end` (what is there is skipped) \
                 shows what it would do, and does it with `--yes`.",
    },
    Code {
        id: "TL-STORE-001",
        title: "the address of the database cannot be used",
        explanation: "It is neither `sqlite:///absolute/path.db` nor `postgres://user@host/database`.",
        remedy: "Correct the `--database` flag or the configuration's database section.",
    },
    Code {
        id: "TL-STORE-002",
        title: "the database was migrated by a newer version",
        explanation: "This version does not know the tables that are there and would write wrong rows.",
        remedy: "Run the version that migrated it, or a newer one.",
    },
    Code {
        id: "TL-STORE-003",
        title: "the id of a topic is not known",
        explanation: "Stored offsets count in one incarnation of a topic. Without the topic's id the store \
                      cannot tell whether it is the same one.",
        remedy: "Create the topics with `throughline topics apply` and start again.",
    },
    Code {
        id: "TL-STORE-004",
        title: "a stored offset counts in another cluster or another topic of that name",
        explanation: "The cluster differs, or the topic was deleted and made anew. Going on would skip or \
                      repeat records.",
        remedy: "Stop the stage's members. `throughline groups adopt <group> --begin earliest` or `--begin \
                 end` begins a new volume in the present topic; it shows first what it would do.",
    },
    Code {
        id: "TL-STORE-005",
        title: "the database refused a statement for good",
        explanation: "The reason is neither the data's nor cured by waiting: a missing table, partition or \
                      right, a changed constraint.",
        remedy: "The message holds the database's code and names table, partition or right. Tables are \
                 brought up to date when a role starts.",
    },
    Code {
        id: "TL-STORE-006",
        title: "rows were to be written without an offset",
        explanation: "A repeat of such a write could not be recognised. This is a defect of the caller.",
        remedy: "Report the defect with the message; nothing was written.",
    },
    Code {
        id: STORE_REFUSES_NOTHING,
        title: "a store refused a write that holds no rows",
        explanation: "The store answered with a data error although only positions were to be written: \
                      its own tables do not fit this version.",
        remedy: "The message holds the database's answer. Tables are brought up to date when a role \
                 starts; undo what was changed in them by hand.",
    },
    Code {
        id: STORE_FELL_BACK,
        title: "the database stands before what it had taken already",
        explanation: "Kafka's copy of the offset is written after the database's commit, so it is never \
                      ahead of it, unless the database lost commits: it was restored from a backup, a \
                      standby took over that lagged behind, or it is another or a new one.",
        remedy: "Where the address is wrong, correct it. Else stop the stage's members: `throughline groups \
                 adopt <group>` shows where the database stands and what retention deleted meanwhile, and \
                 lets the stage go on from there with `--yes`: what the database lost is written again, \
                 nothing twice. A new database begins at the start.",
    },
];

/// Returns what is known about a code; letter case does not matter.
pub fn explain(id: &str) -> Option<&'static Code> {
    CODES.iter().find(|code| code.id.eq_ignore_ascii_case(id.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_well_formed_unique_and_in_order() {
        for pair in CODES.windows(2) {
            assert!(pair[0].id < pair[1].id, "{} comes before {}", pair[0].id, pair[1].id);
        }
        for code in CODES {
            let parts: Vec<&str> = code.id.split('-').collect();
            let number = parts.last().and_then(|n| n.parse::<u32>().ok());
            assert!(parts.len() == 3 && parts[0] == "TL" && number.is_some(), "{}", code.id);
            assert!(!code.title.is_empty() && !code.explanation.is_empty() && !code.remedy.is_empty());
            assert_eq!(explain(&code.id.to_lowercase()), Some(code));
        }
        assert_eq!(explain("TL-NOPE-999"), None);
    }
}
