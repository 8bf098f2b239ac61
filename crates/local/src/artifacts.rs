//! Downloads what the managed components consist of, once, through Maven.
//!
//! Maven checks the checksums and honours the user's mirrors, proxies and credentials in `settings.xml`; that
//! is why no download code of ours replaces it.

use crate::child::find_program;
use crate::error::LocalError;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt::Write;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Takes lines for the person who waits, for instance to print them on a terminal.
pub type Notice<'a> = &'a mut dyn FnMut(&str);

/// What helps where Java or Maven is missing.
const INSTALL: &str = "install Java 17 or newer and Maven: `apt-get install openjdk-17-jre-headless maven` on \
    Debian and Ubuntu, `dnf install java-21-openjdk-headless maven` on Fedora, `brew install openjdk maven` on \
    macOS; or use a Kafka that runs already with --kafka host:port";

/// The shortest time between two notices of a download.
const NOTICE_INTERVAL: Duration = Duration::from_secs(1);

/// One set of artifacts.
struct Set {
    /// The first part of the directory's name.
    name: &'static str,
    /// What people call it, with its size.
    title: &'static str,
    pom: &'static str,
    goal: &'static str,
}

/// 4.2.0 and not 4.3.x: 4.3.0 and 4.3.1 lose the markers of a committed transaction when the broker is killed
/// between commit and markers, after which offsets and readers hang for ever (KAFKA-20734).
const KAFKA: Set = Set {
    name: "kafka-4.2.0",
    title: "Apache Kafka 4.2.0 (55 MB)",
    pom: include_str!("kafka/pom.xml"),
    goal: "dependency:copy-dependencies",
};

const APICURIO: Set = Set {
    name: "apicurio-2.6.13",
    title: "Apicurio Registry 2.6.13 (140 MB)",
    pom: include_str!("apicurio.pom.xml"),
    goal: "dependency:unpack",
};

/// Returns the directory of Kafka's jars, downloading them where they are not there yet.
///
/// # Errors
/// [`LocalError::Missing`] without Maven, [`LocalError::Download`] with what Maven said.
pub fn kafka(notice: Notice<'_>) -> Result<PathBuf, LocalError> {
    fetch(&KAFKA, &cache_dir()?, notice)
}

/// Returns the directory of Apicurio's jars, downloading them where they are not there yet.
///
/// # Errors
/// As [`kafka`].
pub fn apicurio(notice: Notice<'_>) -> Result<PathBuf, LocalError> {
    fetch(&APICURIO, &cache_dir()?, notice)
}

/// Returns the path of `java`.
///
/// # Errors
/// [`LocalError::Missing`] with the commands that install it.
pub fn java() -> Result<PathBuf, LocalError> {
    let home = std::env::var_os("JAVA_HOME").map(|home| Path::new(&home).join("bin/java"));
    let found = home.filter(|java| java.is_file()).or_else(|| find_program("java"));
    found.ok_or(LocalError::Missing { program: "java", purpose: "the managed Kafka", remedy: INSTALL })
}

/// Returns `$THROUGHLINE_CACHE`, `$XDG_CACHE_HOME/throughline` or `~/.cache/throughline`.
fn cache_dir() -> Result<PathBuf, LocalError> {
    let set = |name: &str| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
    set("THROUGHLINE_CACHE")
        .map(PathBuf::from)
        .or_else(|| set("XDG_CACHE_HOME").map(|dir| Path::new(&dir).join("throughline")))
        .or_else(|| set("HOME").map(|home| Path::new(&home).join(".cache/throughline")))
        .ok_or_else(|| LocalError::Download {
            what: "artifacts".to_owned(),
            message: "there is no directory to keep them in: set HOME or THROUGHLINE_CACHE".to_owned(),
        })
}

/// Held while this process downloads: its directory is named after the process, and tests run side by side.
static DOWNLOADING: Mutex<()> = Mutex::new(());

fn fetch(set: &Set, cache: &Path, notice: Notice<'_>) -> Result<PathBuf, LocalError> {
    let _alone = DOWNLOADING.lock();
    let complete = cache.join(format!("{}-{}", set.name, short_hash(set.pom)));
    if complete.is_dir() {
        return Ok(complete);
    }
    let mvn = find_program("mvn").ok_or(LocalError::Missing {
        program: "mvn",
        purpose: "downloading Kafka from Maven Central",
        remedy: INSTALL,
    })?;
    // Each process downloads into its own directory; the rename makes the first complete one count.
    let unfinished = cache.join(format!("{}.{}.tmp", set.name, std::process::id()));
    std::fs::create_dir_all(&unfinished).map_err(LocalError::io("create", &unfinished))?;
    let downloaded = download(set, &mvn, &unfinished, notice);
    if downloaded.is_ok()
        && let Err(error) = std::fs::rename(unfinished.join("files"), &complete)
        && !complete.is_dir()
    {
        return Err(LocalError::io("rename", &unfinished)(error));
    }
    std::fs::remove_dir_all(&unfinished).map_err(LocalError::io("remove", &unfinished))?;
    downloaded.map(|()| complete)
}

fn download(set: &Set, mvn: &Path, dir: &Path, notice: Notice<'_>) -> Result<(), LocalError> {
    let pom = dir.join("pom.xml");
    std::fs::write(&pom, set.pom).map_err(LocalError::io("write", &pom))?;
    notice(&format!("downloading {} through Maven, once", set.title));
    let mut child = Command::new(mvn)
        .args(["-B", "-f"])
        .arg(&pom)
        .arg(set.goal)
        .arg(format!("-DoutputDirectory={}", dir.join("files").display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(LocalError::io("run", mvn))?;
    let stdout = child.stdout.take().expect("it was asked for a pipe");
    let mut last_lines = VecDeque::new();
    let mut files = 0;
    let mut noticed = Instant::now();
    for line in BufReader::new(stdout).lines() {
        let line = line.map_err(LocalError::io("read the output of", mvn))?;
        files += usize::from(line.contains("Downloaded from"));
        if noticed.elapsed() > NOTICE_INTERVAL {
            noticed = Instant::now();
            notice(&format!("downloading {}: {files} files so far", set.title));
        }
        if line.contains("ERROR") {
            last_lines.truncate(9);
            last_lines.push_front(line);
        }
    }
    let status = child.wait().map_err(LocalError::io("wait for", mvn))?;
    if status.success() {
        return Ok(());
    }
    let said = last_lines.into_iter().rev().collect::<Vec<_>>().join("\n");
    let message = format!("mvn ended with {status}:\n{said}");
    Err(LocalError::Download { what: set.title.to_owned(), message })
}

fn short_hash(text: &str) -> String {
    Sha256::digest(text).iter().take(4).fold(String::new(), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_that_does_not_exist_leaves_nothing_behind() {
        let cache = crate::scratch_dir().unwrap();
        let set = Set {
            name: "nothing",
            title: "nothing",
            pom: "<project><modelVersion>4.0.0</modelVersion><groupId>g</groupId><artifactId>a</artifactId></project>",
            goal: "dependency:copy-dependencies",
        };
        let error = fetch(&set, cache.path(), &mut |_| {}).unwrap_err().to_string();
        assert!(error.starts_with("cannot download nothing: mvn ended with exit status: 1:\n"), "{error}");
        assert!(error.contains("'version' is missing"), "{error}");
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_there_is_not_downloaded_again() {
        let cache = crate::scratch_dir().unwrap();
        let complete = cache.path().join(format!("kafka-4.2.0-{}", short_hash(KAFKA.pom)));
        std::fs::create_dir(&complete).unwrap();
        let mut notices = 0;
        assert_eq!(fetch(&KAFKA, cache.path(), &mut |_| notices += 1).unwrap(), complete);
        assert_eq!(notices, 0);
    }
}
