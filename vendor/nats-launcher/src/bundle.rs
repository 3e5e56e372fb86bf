//! Unpacks the embedded nats-server. Invariant: the path handed out holds a whole server with the right hash.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::LaunchError;
use crate::{manifest, resident};

struct Embedded {
    version: &'static str,
    sha256: &'static str,
    compressed: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// The licence under which nats-server is distributed.
pub const LICENSE: &str = include_str!("../licenses/nats-server-LICENSE");

const PARTIAL_PREFIX: &str = ".nats-server-";

/// Nobody takes this long to unpack: an older partial file was left by a crash.
const PARTIAL_STALE_AFTER: Duration = Duration::from_secs(3600);

/// What the program carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleInfo {
    /// The package it came from.
    pub package: &'static str,
    /// Its version; `custom-<hash>` for a file that the builder chose.
    pub version: &'static str,
    /// SHA-256 of the server, in hex.
    pub sha256: &'static str,
}

/// The nats-server inside this program.
pub struct Bundle;

impl Bundle {
    /// What is carried; `None` in a build without a bundle.
    pub fn info() -> Option<BundleInfo> {
        EMBEDDED.map(|embedded| BundleInfo {
            package: manifest::PACKAGE,
            version: embedded.version,
            sha256: embedded.sha256,
        })
    }

    /// A server ready to run: `<dir>/nats-server-<version>`, unpacked when it is missing or damaged. A build
    /// without a bundle answers with the `nats-server` of PATH.
    pub fn install(dir: &Path) -> Result<PathBuf, LaunchError> {
        let Some(embedded) = EMBEDDED else {
            return find_in_path().ok_or(LaunchError::NoServer);
        };
        let path = dir.join(format!("nats-server-{}", embedded.version));
        let fail = |source| LaunchError::Unpack { path: path.clone(), source };
        fs::create_dir_all(dir).map_err(fail)?;
        if is_whole(&path, embedded.sha256).map_err(fail)? {
            return Ok(path);
        }
        sweep_partials(dir);
        let binary = zstd::decode_all(embedded.compressed).map_err(fail)?;
        resident::give_back(embedded.compressed);
        if hex(Sha256::digest(&binary).as_slice()) != embedded.sha256 {
            return Err(LaunchError::Damaged { wanted: embedded.sha256 });
        }
        write_whole(dir, &path, &binary).map_err(fail)?;
        Ok(path)
    }
}

fn is_whole(path: &Path, sha256: &str) -> io::Result<bool> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    if file.metadata()?.permissions().mode() & 0o777 != 0o755 {
        return Ok(false);
    }
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(hasher.finalize().as_slice()) == sha256),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// By rename: whoever runs the old file goes on running it, and a crash leaves either nothing or all of it.
fn write_whole(dir: &Path, path: &Path, binary: &[u8]) -> io::Result<()> {
    let mut partial = tempfile::Builder::new().prefix(PARTIAL_PREFIX).tempfile_in(dir)?;
    partial.write_all(binary)?;
    partial.as_file().set_permissions(fs::Permissions::from_mode(0o755))?;
    partial.as_file().sync_all()?;
    partial.persist(path).map_err(|e| e.error)?;
    File::open(dir)?.sync_all()
}

fn sweep_partials(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let stale = entry.file_name().to_string_lossy().starts_with(PARTIAL_PREFIX)
            && entry
                .metadata()
                .and_then(|meta| meta.modified())
                .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > PARTIAL_STALE_AFTER));
        if stale {
            // Only disk space is at stake.
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn find_in_path() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("nats-server")).find(|candidate| {
        candidate.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_licence_is_there() {
        assert!(LICENSE.contains("Apache License"));
    }

    #[test]
    fn unpacks_once_and_again_when_damaged() {
        let dir = tempfile::tempdir().expect("a directory");
        let Some(info) = Bundle::info() else { return };
        let path = Bundle::install(dir.path()).expect("unpacks");
        assert_eq!(path, dir.path().join(format!("nats-server-{}", info.version)));
        let first = fs::metadata(&path).expect("there").modified().expect("a time");

        Bundle::install(dir.path()).expect("is there");
        let second = fs::metadata(&path).expect("there").modified().expect("a time");
        assert_eq!(first, second, "a whole server must not be written again");

        let mut bytes = fs::read(&path).expect("readable");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, &bytes).expect("writable");
        Bundle::install(dir.path()).expect("unpacks again");
        assert!(is_whole(&path, info.sha256).expect("readable"));

        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("ours");
        Bundle::install(dir.path()).expect("unpacks again");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o755);
        let names: Vec<_> = fs::read_dir(dir.path()).expect("readable").flatten().collect();
        assert_eq!(names.len(), 1, "no partial file may stay behind");
    }
}
