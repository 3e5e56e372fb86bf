//! The configuration: as typed ([`raw`]), then validated ([`valid`]). Invariant: a flag goes over the environment,
//! that over the file, that over the default; and whoever holds a [`Config`] needs no further check of its fields.

pub mod databases;
pub mod duration;
pub mod error;
pub mod external;
pub mod raw;
mod size;
pub mod valid;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

pub use error::ConfigError;
pub use external::External;
pub use valid::{Advertise, Config, DatabaseSpec, Join, Journal, TableFilter, TableGlobs};

use raw::Raw;

/// What the process finds around itself; tests make their own.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// The environment's variables whose names begin with [`raw::ENV_PREFIX`].
    pub variables: Vec<(OsString, OsString)>,
    /// The host's name, if it has one.
    pub host_name: Option<String>,
    /// The user's data directory for litemesh, if there is one.
    pub data_dir: Option<PathBuf>,
}

impl Surroundings {
    /// Those of this process.
    pub fn of_process() -> Self {
        let ours =
            |(name, _): &(OsString, OsString)| name.to_str().is_some_and(|n| n.starts_with(raw::ENV_PREFIX));
        let host_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let dirs = directories::ProjectDirs::from("", "", "litemesh");
        Self {
            variables: std::env::vars_os().filter(ours).collect(),
            host_name: Some(host_name),
            data_dir: dirs.map(|d| d.data_local_dir().to_owned()),
        }
    }
}

/// The configuration from all its sources; `file` is the one that `--config` or `LITEMESH_CONFIG` names.
pub fn load(flags: Raw, file: Option<&Path>, around: &Surroundings) -> Result<Config, ConfigError> {
    let environment = Raw::from_environment(&around.variables)?;
    let file = file.map(Raw::from_file).transpose()?.unwrap_or_default();
    flags.check_source("the command line")?;
    let merged = flags.over(environment).over(file);
    valid::validate(merged, around)
}

/// The state directory of commands that take no other configuration: the one given, else the default.
pub fn state_dir(given: Option<&Path>, around: &Surroundings) -> Result<PathBuf, ConfigError> {
    match (given, &around.data_dir) {
        (Some(dir), _) if dir.as_os_str().is_empty() => {
            Err(ConfigError::value("state_dir", "", "it must not be empty"))
        }
        (Some(dir), _) => Ok(valid::absolute(dir)),
        (None, Some(dir)) => Ok(dir.clone()),
        (None, None) => Err(ConfigError::NoStateDir),
    }
}

#[cfg(test)]
mod tests;
