//! A class-data archive of the broker (JEP 350): the JVM maps its classes instead of reading and checking them
//! in a hundred jars, which is much of what a start costs.

use super::{KafkaOptions, ManagedKafka};
use crate::artifacts::{self, Notice};
use crate::error::LocalError;
use crate::scratch_dir;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Returns the archive beside the jars, making it where this JVM has none there yet: a broker is started on
/// nothing and ended. Another process that makes it at the same time is waited for.
///
/// # Errors
/// As [`ManagedKafka::start`].
pub(super) fn archive(jars: &Path, notice: Notice<'_>) -> Result<PathBuf, LocalError> {
    let file = jars.join(format!("classes-{}.jsa", jvm()?));
    if file.exists() {
        return Ok(file);
    }
    let lock_file = jars.join("classes.lock");
    let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&lock_file);
    let lock = lock.map_err(LocalError::io("open", &lock_file))?;
    lock.lock().map_err(LocalError::io("lock", &lock_file))?;
    if file.exists() {
        return Ok(file);
    }
    notice("preparing Kafka for quick starts, once");
    let unfinished = file.with_extension("tmp");
    let scratch = scratch_dir()?;
    let options = KafkaOptions::new(scratch.path().join("kafka"));
    let mut kafka = ManagedKafka::prepare(options, jars.to_owned(), None)?;
    kafka.launch(&[format!("-XX:ArchiveClassesAtExit={}", unfinished.display())])?;
    kafka.stop()?;
    std::fs::rename(&unfinished, &file).map_err(LocalError::io("rename", &unfinished))?;
    Ok(file)
}

/// Tells JVMs apart, because an archive fits only the one that wrote it: the age of the JVM's own classes.
fn jvm() -> Result<u64, LocalError> {
    let java = artifacts::java()?;
    let java = java.canonicalize().map_err(LocalError::io("find", &java))?;
    let modules = java.ancestors().nth(2).map(|home| home.join("lib/modules"));
    let modified = modules.and_then(|file| std::fs::metadata(file).ok()).and_then(|m| m.modified().ok());
    let age = modified.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    Ok(age.map_or(0, |age| age.as_secs()))
}
