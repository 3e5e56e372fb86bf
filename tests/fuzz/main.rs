//! Everything that reads bytes of others gets bytes that are wrong: nothing panics, nothing is applied in part, and what
//! is right is taken in afterwards. Samples are in `corpus`, a folder a reader; each is also read as it is.
//!
//! `LITEMESH_FUZZ_CASES=n` tries so many changes a reader, `LITEMESH_FUZZ_SEED=n` others. A failure is shrunk, and
//! prints the bytes; put them into the reader's folder, so that they stay tried. `LITEMESH_FUZZ_WRITE=1` writes the
//! samples of the messages anew, when their format changes.

mod mutate;
mod peers;
mod readers;
#[path = "../sim/site.rs"]
#[allow(dead_code)]
mod site;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |v| v.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn corpus(reader: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(reader)
}

/// What it gives, or what it panicked with.
fn attempt<T>(what: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(what)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        format!("it panicked: {}", text.unwrap_or_default())
    })
}

/// The samples of a reader.
fn samples(reader: &str) -> Vec<Vec<u8>> {
    let Ok(folder) = std::fs::read_dir(corpus(reader)) else { return Vec::new() };
    let mut files: Vec<PathBuf> = folder.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// Writes what the readers' samples are when asked to.
fn write_samples(reader: &str, samples: &[Vec<u8>]) {
    if std::env::var_os("LITEMESH_FUZZ_WRITE").is_none() {
        return;
    }
    let folder = corpus(reader);
    std::fs::create_dir_all(&folder).unwrap();
    for (i, sample) in samples.iter().enumerate() {
        std::fs::write(folder.join(format!("made-{i}")), sample).unwrap();
    }
}

/// Tries samples as they are and changed; `read` panics or says what is wrong.
fn fuzz(reader: &str, cases: u64, read: impl Fn(&[u8]) -> Result<(), String>) {
    fuzz_also(reader, Vec::new(), cases, read);
}

/// The same, with samples that are made by the test.
fn fuzz_also(reader: &str, made: Vec<Vec<u8>>, cases: u64, read: impl Fn(&[u8]) -> Result<(), String>) {
    let samples = [samples(reader), made].concat();
    assert!(!samples.is_empty(), "{reader} has no samples");
    for sample in &samples {
        if let Err(why) = read(sample) {
            panic!("{reader}: {why}");
        }
    }
    let cases = number("LITEMESH_FUZZ_CASES", cases) as u32;
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Config::default() };
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&number("LITEMESH_FUZZ_SEED", 1).to_be_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(config, rng);
    // What panics is told below, with its bytes.
    std::panic::set_hook(Box::new(|_| {}));
    let outcome = runner.run(&mutate::mutated(samples), |bytes| read(&bytes).map_err(TestCaseError::fail));
    drop(std::panic::take_hook());
    match outcome {
        Ok(()) => println!("{reader}: {cases} tried"),
        Err(TestError::Fail(why, bytes)) => {
            let file = std::env::temp_dir().join(format!("{reader}-{:016x}", seed_of(&bytes)));
            std::fs::write(&file, &bytes).unwrap();
            panic!("{reader}: {why}\nthe {} bytes are in {}: {bytes:?}", bytes.len(), file.display());
        }
        Err(TestError::Abort(why)) => panic!("{reader}: {why}"),
    }
}

fn seed_of(bytes: &[u8]) -> u64 {
    let hash = blake3::hash(bytes);
    u64::from_be_bytes(hash.as_bytes()[..8].try_into().unwrap())
}
