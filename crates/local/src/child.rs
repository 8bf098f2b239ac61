//! A program that lives no longer than this process.
//!
//! Three measures, none of which needs unsafe code (`PR_SET_PDEATHSIG` would need a hook between fork and
//! exec, and fires when the *thread* that forked ends):
//! a shell stands between us and the program and holds the end of a pipe of ours; when the pipe closes, that
//! is when we end in whatever way, it kills the program. The program has a process group of its own, so that
//! Ctrl-C on a terminal reaches us alone and we stop it in order. And its pid is written down with its start
//! time, so that the next start on the same directory removes what a crash of the shell left behind.

use crate::error::LocalError;
use crate::lock::DirLock;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The supervising shell's script.
const SUPERVISE: &str = include_str!("supervise.sh");

/// A log file above this size is set aside at the next start.
const LOG_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// How much of a log an error shows.
const TAIL_LINES: usize = 15;

/// How often a condition is looked at while waiting for it.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What can be done to a child from outside, as faults do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGSTOP: it hangs; connections stay open and nothing answers.
    Stop,
    /// SIGCONT: it goes on.
    Continue,
    /// SIGKILL: it is gone at once, with all its processes.
    Kill,
}

/// What to run.
#[derive(Debug)]
pub struct Program<'a> {
    /// The name in errors, also of the log and pid files.
    pub name: &'static str,
    /// The directory that the program has for itself.
    pub dir: &'a Path,
    /// The program and its arguments.
    pub command: Vec<OsString>,
    /// Variables added to the environment.
    pub env: Vec<(&'static str, OsString)>,
    /// User and group to run it as, only for root.
    pub user: Option<(u32, u32)>,
}

/// A running program.
#[derive(Debug)]
pub struct Supervised {
    name: &'static str,
    pid: Pid,
    shell: Child,
    /// Closing it makes the shell kill the program.
    _lifeline: ChildStdin,
    log: PathBuf,
    pid_file: PathBuf,
    _lock: DirLock,
}

impl Supervised {
    /// Starts the program after removing what an earlier start on the same directory may have left.
    pub fn spawn(program: Program<'_>) -> Result<Self, LocalError> {
        let Program { name, dir, command, env, user } = program;
        let lock = DirLock::acquire(dir)?;
        let pid_file = dir.join(format!("{name}.pid"));
        remove_leftover(&pid_file, dir)?;
        let log = open_log(name, dir, user)?;

        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(SUPERVISE).arg(name).arg(&log).args(&command);
        shell.envs(env).current_dir(dir).process_group(0);
        shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        if let Some((uid, gid)) = user {
            shell.uid(uid).gid(gid);
        }
        let mut shell = shell.spawn().map_err(LocalError::io("run", Path::new("/bin/sh")))?;
        let lifeline = shell.stdin.take().expect("it was asked for a pipe");
        let stdout = shell.stdout.take().expect("it was asked for a pipe");
        let mut line = String::new();
        let told = BufReader::new(stdout).read_line(&mut line);
        let pid = told.ok().and_then(|_| line.trim().parse().ok()).and_then(Pid::from_raw);
        let Some(pid) = pid else {
            drop(lifeline);
            let status = shell.wait().map_err(LocalError::io("wait for", Path::new("/bin/sh")))?;
            return Err(failed(name, &log, format!("could not be run by its shell ({status})")));
        };
        let start = start_time(pid).unwrap_or_default();
        let written = std::fs::write(&pid_file, format!("{} {start}", pid.as_raw_nonzero()));
        written.map_err(LocalError::io("write", &pid_file))?;
        Ok(Self { name, pid, shell, _lifeline: lifeline, log, pid_file, _lock: lock })
    }

    /// Returns the program's process id.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Says whether the program still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.shell.try_wait(), Ok(None))
    }

    /// Waits until `ready` returns true, giving up when the program ends.
    pub fn wait_ready(&mut self, limit: Duration, mut ready: impl FnMut() -> bool) -> Result<(), LocalError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.exit_status()? {
                return Err(failed(self.name, &self.log, format!("ended with {status}")));
            }
            if ready() {
                return Ok(());
            }
            if Instant::now() > deadline {
                let what = format!("was not ready within {} s", limit.as_secs());
                return Err(failed(self.name, &self.log, what));
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Does a fault to the program and all processes that it has started. A process that is gone already
    /// is left out.
    pub(crate) fn fault(&self, fault: Fault) {
        let signal = match fault {
            Fault::Stop => Signal::STOP,
            Fault::Continue => Signal::CONT,
            Fault::Kill => Signal::KILL,
        };
        let mut pids = descendants(self.pid);
        pids.insert(0, self.pid);
        for pid in pids {
            send(pid, signal);
        }
    }

    /// Asks the program to end with `signal` and waits; after `limit` it is killed. Returns how it ended.
    pub(crate) fn stop(mut self, signal: Signal, limit: Duration) -> Result<ExitStatus, LocalError> {
        send(self.pid, signal);
        // A program under SIGSTOP takes the signal when it goes on.
        self.fault(Fault::Continue);
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.exit_status()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                tracing::warn!(name = self.name, ?limit, "did not stop in time and is killed");
                self.fault(Fault::Kill);
                return self.shell.wait().map_err(LocalError::io("wait for", Path::new(self.name)));
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    fn exit_status(&mut self) -> Result<Option<ExitStatus>, LocalError> {
        self.shell.try_wait().map_err(LocalError::io("wait for", Path::new(self.name)))
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        if self.is_running() {
            self.fault(Fault::Kill);
        }
        // The shell ends when the program has; nothing is left after this.
        if let Err(error) = self.shell.wait() {
            tracing::warn!(name = self.name, %error, "cannot wait for the supervising shell");
        }
        if let Err(error) = std::fs::remove_file(&self.pid_file)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(name = self.name, %error, "cannot remove the pid file");
        }
    }
}

/// Runs a program to its end; an error holds the end of what it said.
pub(crate) fn run_to_end(name: &'static str, log: &Path, command: &mut Command) -> Result<(), LocalError> {
    let shown = PathBuf::from(command.get_program());
    let output = command.stdin(Stdio::null()).output().map_err(LocalError::io("run", &shown))?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let tail = last_lines(&String::from_utf8_lossy(&said));
    let what = format!("could not be prepared: {} ended with {}", shown.display(), output.status);
    Err(LocalError::Failed { name, what, log: log.to_owned(), tail })
}

/// Looks a program up in `PATH` and in the places where system services are kept.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let service_dirs = ["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from);
    let mut candidates = std::env::split_paths(&path).chain(service_dirs).map(|dir| dir.join(name));
    candidates.find(|candidate| candidate.is_file())
}

/// Makes arguments from strings and paths.
pub(crate) fn words<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) -> Vec<OsString> {
    words.into_iter().map(|word| word.as_ref().to_owned()).collect()
}

fn failed(name: &'static str, log: &Path, what: String) -> LocalError {
    let tail = read_tail(log).unwrap_or_else(|error| format!("(cannot be read: {error})"));
    LocalError::Failed { name, what, log: log.to_owned(), tail }
}

fn read_tail(log: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(log)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(16 * 1024)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(last_lines(&String::from_utf8_lossy(&bytes)))
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

fn open_log(name: &str, dir: &Path, user: Option<(u32, u32)>) -> Result<PathBuf, LocalError> {
    let log = dir.join(format!("{name}.log"));
    if std::fs::metadata(&log).is_ok_and(|metadata| metadata.len() > LOG_BYTES_MAX) {
        let old = dir.join(format!("{name}.log.1"));
        std::fs::rename(&log, &old).map_err(LocalError::io("rename", &log))?;
    }
    OpenOptions::new().append(true).create(true).open(&log).map_err(LocalError::io("open", &log))?;
    if let Some((uid, gid)) = user {
        std::os::unix::fs::chown(&log, Some(uid), Some(gid)).map_err(LocalError::io("chown", &log))?;
    }
    Ok(log)
}

fn send(pid: Pid, signal: Signal) {
    // The only error left is that the process is gone, which is what a signal is for.
    if let Err(error) = kill_process(pid, signal) {
        tracing::debug!(?pid, ?signal, %error, "signal not delivered");
    }
}

/// Kills the program of an earlier start that still runs, if the pid file's process is that one.
fn remove_leftover(pid_file: &Path, dir: &Path) -> Result<(), LocalError> {
    let text = match std::fs::read_to_string(pid_file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(LocalError::io("read", pid_file)(error)),
    };
    if let Some(pid) = leftover(&text, dir) {
        tracing::warn!(?pid, dir = %dir.display(), "a program of an earlier start still runs and is killed");
        for pid in descendants(pid).into_iter().chain([pid]) {
            send(pid, Signal::KILL);
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while leftover(&text, dir).is_some() && Instant::now() < deadline {
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
    std::fs::remove_file(pid_file).map_err(LocalError::io("remove", pid_file))
}

/// Returns the process that a pid file means, if it runs, started at the time written down and names `dir`
/// on its command line: a pid alone may belong to somebody else by now.
fn leftover(pid_file: &str, dir: &Path) -> Option<Pid> {
    let (pid, start) = pid_file.split_once(' ')?;
    let pid = Pid::from_raw(pid.parse().ok()?)?;
    if start_time(pid)? != start {
        return None;
    }
    let command = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
    let names_dir = String::from_utf8_lossy(&command).contains(&*dir.to_string_lossy());
    names_dir.then_some(pid)
}

/// Returns the start time of a process in clock ticks since boot, as `/proc` spells it.
fn start_time(pid: Pid) -> Option<String> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    stat_field(&stat, 22).map(str::to_owned)
}

/// Returns a field of `/proc/<pid>/stat` by its number in proc(5); the name of the program, field 2, may
/// hold spaces and parentheses, so what follows is counted from its end.
fn stat_field(stat: &str, number: usize) -> Option<&str> {
    let after_name = &stat[stat.rfind(')')? + 1..];
    after_name.split_ascii_whitespace().nth(number - 3)
}

/// Returns every process below `root`, for instance PostgreSQL's backends, which have sessions of their own.
fn descendants(root: Pid) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut parents = Vec::new();
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let parent = stat_field(&stat, 4).and_then(|field| field.parse::<i32>().ok());
        parents.extend(parent.map(|parent| (pid, parent)));
    }
    let mut found = vec![root.as_raw_nonzero().get()];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(parents.iter().filter(|(_, p)| *p == parent).map(|(pid, _)| *pid));
        next += 1;
    }
    found.into_iter().skip(1).filter_map(Pid::from_raw).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(dir: &Path) -> Supervised {
        // The directory is on the command line, as it is on that of every real component.
        let script = format!("sleep 600; : {}", dir.display());
        let command = words(["/bin/sh".to_owned(), "-c".to_owned(), script]);
        Supervised::spawn(Program { name: "sleeper", dir, command, env: Vec::new(), user: None }).unwrap()
    }

    fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !condition() {
            assert!(Instant::now() < deadline, "{what} did not come about within 10 s");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn runs(pid: u32) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|stat| stat_field(&stat, 3) != Some("Z"))
    }

    #[test]
    fn a_dropped_child_is_gone() {
        let dir = crate::scratch_dir().unwrap();
        let child = sleeper(dir.path());
        let pid = child.pid();
        assert!(runs(pid));
        drop(child);
        assert!(!runs(pid));
        assert!(!dir.path().join("sleeper.pid").exists());
    }

    #[test]
    fn a_stopped_child_is_killed_when_its_lifeline_is_cut() {
        let dir = crate::scratch_dir().unwrap();
        let mut child = sleeper(dir.path());
        let pid = child.pid();
        child.fault(Fault::Stop);
        // What the kernel does to the pipe when this process is killed.
        let (other, _) = std::process::Command::new("true")
            .stdin(Stdio::piped())
            .spawn()
            .map(|mut other| (other.stdin.take().unwrap(), other))
            .unwrap();
        drop(std::mem::replace(&mut child._lifeline, other));
        wait_until("the end of the child", || !runs(pid));
    }

    #[test]
    fn a_leftover_of_an_earlier_start_is_removed_and_a_stranger_is_not() {
        let dir = crate::scratch_dir().unwrap();
        let stranger = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = Pid::from_child(&stranger);
        let written = format!("{} {}", pid.as_raw_nonzero(), start_time(pid).unwrap());
        std::fs::write(dir.path().join("sleeper.pid"), written).unwrap();
        let first = sleeper(dir.path());
        assert!(runs(stranger.id()), "it does not name the directory, so it is not ours");
        let mut stranger = stranger;
        stranger.kill().unwrap();
        stranger.wait().unwrap();

        let noted = std::fs::read_to_string(dir.path().join("sleeper.pid")).unwrap();
        // The pid is told before the program has taken the shell's place.
        wait_until("the program to show its name", || leftover(&noted, dir.path()).is_some());
        remove_leftover(&dir.path().join("sleeper.pid"), dir.path()).unwrap();
        assert!(leftover(&noted, dir.path()).is_none());
        drop(first);
    }

    #[test]
    fn the_end_of_a_child_is_reported_with_its_log() {
        let dir = crate::scratch_dir().unwrap();
        let command = words(["/bin/sh", "-c", "echo out of luck; exit 3"]);
        let program = Program { name: "unlucky", dir: dir.path(), command, env: Vec::new(), user: None };
        let mut child = Supervised::spawn(program).unwrap();
        let message = child.wait_ready(Duration::from_secs(10), || false).unwrap_err().to_string();
        assert!(message.starts_with("unlucky ended with exit status: 3; the end of its log "), "{message}");
        assert!(message.ends_with("out of luck"), "{message}");
    }
}
