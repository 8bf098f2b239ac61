//! Broken on purpose: whether the checks would notice. Only a build with the feature `sabotage` knows the
//! variable `SABOTAGE`; `make sabotage` makes one and expects the run under faults to fail with every choice.

/// What a sabotaged build does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// The bridge acknowledges a publish before Kafka did.
    AcknowledgeEarly,
    /// A load stage moves its offset before it writes the rows.
    OffsetFirst,
    /// The bridge drops what does not fit into the producer's queue, and acknowledges it.
    DropOnFull,
    /// A decide stage begins without the state of its changelog.
    ForgetState,
    /// A load stage writes whatever the offset in the store is.
    SkipCompare,
}

impl Sabotage {
    /// Every choice, with its name in the variable.
    pub const ALL: [(&str, Self); 5] = [
        ("acknowledge_early", Self::AcknowledgeEarly),
        ("offset_first", Self::OffsetFirst),
        ("drop_on_full", Self::DropOnFull),
        ("forget_state", Self::ForgetState),
        ("skip_compare", Self::SkipCompare),
    ];

    /// Says whether this is to be done wrong. Always `false`, and known to be when compiling, without the
    /// feature.
    #[cfg(not(feature = "sabotage"))]
    #[inline(always)]
    pub const fn is_chosen(self) -> bool {
        false
    }

    /// Says whether this is to be done wrong.
    ///
    /// # Panics
    /// When the variable names no choice.
    #[cfg(feature = "sabotage")]
    pub fn is_chosen(self) -> bool {
        static CHOSEN: std::sync::OnceLock<Option<Sabotage>> = std::sync::OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| {
            let name = std::env::var("SABOTAGE").ok()?;
            let found = Self::ALL.iter().find(|(known, _)| *known == name);
            let (_, choice) = found.unwrap_or_else(|| panic!("SABOTAGE={name} names no choice"));
            tracing::error!(?choice, "this build is sabotaged: it loses or doubles data on purpose");
            Some(*choice)
        });
        *chosen == Some(self)
    }
}
