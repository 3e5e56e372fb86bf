//! Why a configuration is refused. Invariant: every message names the option or file and says what to write instead;
//! none holds a secret.

use std::path::PathBuf;

use crate::core::names::NameError;

/// The exit code for a wrong configuration (`EX_CONFIG` of sysexits).
pub const EXIT_CONFIG: u8 = 78;

/// A configuration that cannot be used. Nothing was started or changed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration file could not be read.
    #[error("the configuration file {path} cannot be read: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no TOML, or a value is of another type.
    #[error("the configuration file {path}, line {line}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where, counted from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A key that means nothing.
    #[error("{place}: there is no option {key:?}; did you mean {nearest:?}?")]
    UnknownKey {
        /// The file.
        place: String,
        /// The key as written.
        key: String,
        /// The known key that looks most like it.
        nearest: String,
    },
    /// A variable of the environment that is not Unicode.
    #[error("the environment variable {0} is not valid Unicode: set it anew, or unset it")]
    NotUnicode(String),
    /// A value that its option does not accept.
    #[error(
        "{option} = {value:?}: {reason} (set by --{flag}, {variable} or `{option}` in the configuration file)"
    )]
    Value {
        /// The option as in the file.
        option: &'static str,
        /// The option as a flag.
        flag: String,
        /// The option as a variable.
        variable: String,
        /// What was given.
        value: String,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A token and a file with a token at once.
    #[error("{0} gives both a token (join) and a file with one (join_file): keep one of them")]
    TwoTokens(String),
    /// The file with the token.
    #[error("the file {path} that should hold the join token {reason}")]
    JoinFile {
        /// The file.
        path: PathBuf,
        /// What is the matter, and what to do.
        reason: String,
    },
    /// A file's name that cannot be a database's.
    #[error(
        "{path} cannot go by its own name: {source}; write NAME={path}, with the same NAME on every host"
    )]
    Stem {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: NameError,
    },
    /// The NAME of `NAME=PATH`.
    #[error("in {text:?}: {source}; it is NAME=PATH, with the same NAME on every host")]
    DatabaseName {
        /// As given.
        text: String,
        /// Why not.
        source: NameError,
    },
    /// Two files of one name.
    #[error(
        "{first} and {second} would both be the database {name:?}: name one of them, as in other={second}"
    )]
    SameName {
        /// The name.
        name: String,
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// One file under two names.
    #[error("{first:?} and {second:?} are the same file, {path}: leave out one of them")]
    SameFile {
        /// One database, as given.
        first: String,
        /// The other.
        second: String,
        /// The file.
        path: PathBuf,
    },
    /// A glob without any file.
    #[error(
        "no SQLite file matches {0:?}: name the file itself if a peer is to bring it, or correct the pattern"
    )]
    NoMatch(String),
    /// An option that means nothing without another.
    #[error("{option} (--{0}) means nothing without {other} (--{1}): give that as well, or leave {option} out", .option.replace('_', "-"), .other.replace('_', "-"))]
    Needs {
        /// What was given.
        option: &'static str,
        /// What was not.
        other: &'static str,
    },
    /// Options that contradict each other.
    #[error("with {first} (--{0}) there is no {second} (--{1}): {reason}; leave one of them out", .first.replace('_', "-"), .second.replace('_', "-"))]
    Together {
        /// One.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// Why not both.
        reason: &'static str,
    },
    /// Two listeners on one port.
    #[error("{first} and {second} both listen on port {port}: give one of them another port")]
    SamePort {
        /// One option.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// The port.
        port: u16,
    },
    /// No name can be made of the host's.
    #[error("no node name can be made of the host's name {0:?}: give one with --name")]
    HostName(String),
    /// There is no home directory.
    #[error("the user has no home directory to keep litemesh's state in: give a directory with --state-dir")]
    NoStateDir,
}

impl ConfigError {
    /// The error about one option's value.
    pub fn value(option: &'static str, value: &str, reason: impl Into<String>) -> Self {
        let (flag, variable) = (option.replace('_', "-"), super::raw::variable(option));
        Self::Value { option, flag, variable, value: value.to_owned(), reason: reason.into() }
    }

    /// What the process ends with: 78, `EX_CONFIG`. (Wrong usage, 2, is clap's to tell.)
    pub fn exit_code(&self) -> u8 {
        EXIT_CONFIG
    }
}
