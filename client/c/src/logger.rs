//! The log for operators, on standard error: a server's error log.
//!
//! A line is one write, so that those of several processes do not mix. Nothing comes of one that fails: a full disk must not end a
//! server. And descriptor 2 may become another file: servers that `inetd` starts have their client's connection there, and daemons
//! that closed it get it back with the next file that they open.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{Stderr, Write as _, stderr};
use std::path::Path;
use std::sync::OnceLock;

use log::{Level, LevelFilter, Log, Metadata, Record};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::syslog::{Facility, Priority, Severity, syslog};
use nix::unistd::write;

static SINK: OnceLock<Sink> = OnceLock::new();

enum Sink {
    /// Standard error, and which file that was at first.
    Stderr(Option<Identity>),
    Syslog,
    File(File),
    Nowhere,
}

type Identity = (u64, u64);

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("resumed")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let mut line = String::new();
            let level = record.level().as_str().to_ascii_lowercase();
            if writeln!(line, "resumed: {level}: {}", record.args()).is_ok() {
                SINK.get_or_init(Sink::of_process).write(record.level(), &line);
            }
        }
    }

    fn flush(&self) {}
}

/// Has messages written to standard error as it is now, unless the program has a logger. If it is a socket, they go to the system log
/// if systemd says that it is the journal's, or nowhere.
pub fn start_logging() {
    SINK.get_or_init(Sink::of_process);
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Has messages appended to a file, before [`start_logging`]. If it cannot be opened, they are written as without it.
pub fn log_to_file(path: &Path) {
    if let Ok(file) = OpenOptions::new().append(true).create(true).open(path) {
        let _ = SINK.set(Sink::File(file));
    }
}

impl Sink {
    fn of_process() -> Self {
        let Ok(status) = fstat(stderr()) else { return Self::Nowhere };
        if kind(&status) != SFlag::S_IFSOCK {
            return Self::Stderr(Some(identity(&status)));
        }
        let journal = std::env::var("JOURNAL_STREAM").ok().and_then(|stream| {
            let (device, inode) = stream.split_once(':')?;
            Some((device.parse().ok()?, inode.parse().ok()?))
        });
        if journal == Some(identity(&status)) { Self::Syslog } else { Self::Nowhere }
    }

    fn write(&self, level: Level, line: &str) {
        // A line that cannot be written is lost.
        match self {
            Self::Stderr(at_first) if may_write(&stderr(), *at_first) => drop(write(stderr(), line.as_bytes())),
            Self::File(file) => drop((&mut &*file).write(line.as_bytes())),
            Self::Syslog => drop(syslog(Priority::new(severity(level), Facility::LOG_DAEMON), line.trim_end())),
            Self::Stderr(_) | Self::Nowhere => {}
        }
    }
}

/// Returns whether standard error still is a log.
fn may_write(stderr: &Stderr, at_first: Option<Identity>) -> bool {
    let Ok(status) = fstat(stderr) else { return false };
    match kind(&status) {
        SFlag::S_IFSOCK => false,
        SFlag::S_IFREG => {
            let flags = fcntl(stderr, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_truncate);
            flags.contains(OFlag::O_APPEND) || at_first == Some(identity(&status))
        }
        _ => true,
    }
}

fn kind(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT
}

fn identity(status: &FileStat) -> Identity {
    (status.st_dev, status.st_ino)
}

fn severity(level: Level) -> Severity {
    match level {
        Level::Error => Severity::LOG_ERR,
        Level::Warn => Severity::LOG_WARNING,
        Level::Info => Severity::LOG_INFO,
        Level::Debug | Level::Trace => Severity::LOG_DEBUG,
    }
}
