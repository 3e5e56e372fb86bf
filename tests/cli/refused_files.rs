//! Files that cannot be replicated: told, and left as they are.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::refusal::{SCHEMA, refused, up_refused, up_refused_with};
use crate::support::{Node, dump};

/// A user without any rights, for tests that run as root.
const NOBODY: u32 = 65_534;

#[test]
fn what_is_no_database() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(dir.path(), "a", &["app.db"]);
    std::fs::write(node.file("app.db"), "A letter, and no database at all. ".repeat(100)).unwrap();
    up_refused(&node, None, &["app.db", "not a SQLite database", "nothing was changed"]);
    std::fs::remove_file(node.file("app.db")).unwrap();
    std::fs::create_dir(node.file("app.db")).unwrap();
    refused(node.up_command(None), 1, &["app.db", "not a regular file", "name the SQLite file"]);
    let mut lost = Node::new(dir.path(), "b", &["nowhere/app.db"]);
    up_refused(&lost, None, &["nowhere/app.db", "its directory does not exist", "make it"]);
    // The first half of a file, as a broken copy leaves it.
    lost.databases = vec!["app.db".into()];
    lost.exec("app.db", SCHEMA);
    lost.exec(
        "app.db",
        "WITH RECURSIVE n(i) AS (VALUES(1) UNION ALL SELECT i + 1 FROM n WHERE i < 999)
        INSERT INTO t SELECT i, hex(randomblob(100)) FROM n",
    );
    let bytes = std::fs::read(lost.file("app.db")).unwrap();
    std::fs::write(lost.file("app.db"), &bytes[..1_000]).unwrap();
    up_refused(&lost, None, &["app.db"]);
}

/// Runs as somebody who may not do what root may.
fn as_nobody(node: &Node, dir: &Path) -> Command {
    let command = node.up_command(None);
    if !rustix::process::geteuid().is_root() {
        return command;
    }
    // The binary may lie where only root may go.
    let program = dir.join("litemesh");
    if !program.exists() {
        std::fs::copy(command.get_program(), &program).unwrap();
    }
    let mut other = Command::new(program);
    other.args(command.get_args()).current_dir(&node.home);
    command.get_envs().for_each(|(name, value)| {
        match value {
            Some(value) => other.env(name, value),
            None => other.env_remove(name),
        };
    });
    other.uid(NOBODY).gid(NOBODY);
    chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
    other
}

#[test]
fn what_may_not_be_read_or_written() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(dir.path(), "a", &["app.db"]);
    node.exec("app.db", SCHEMA);
    let mode = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    if rustix::process::geteuid().is_root() {
        chown(&node.home, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    for file_mode in [0o444, 0o000] {
        mode(&node.file("app.db"), file_mode);
        let command = as_nobody(&node, dir.path());
        up_refused_with(&node, command, 1, &["app.db", "must be able to read and write"]);
    }
    mode(&node.file("app.db"), 0o666);
    // SQLite needs to make files beside it.
    mode(&node.home, 0o755);
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    if rustix::process::geteuid().is_root() {
        chown(&node.home, Some(0), Some(0)).unwrap();
        chown(&state, Some(NOBODY), Some(NOBODY)).unwrap();
    } else {
        mode(&node.home, 0o555);
    }
    let mut command = as_nobody(&node, dir.path());
    command.arg("--log").arg("info");
    let args: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
    let own = node.state_dir();
    let args =
        args.into_iter().map(|a| if a == own.as_os_str() { state.clone().into_os_string() } else { a });
    let args: Vec<_> = args.collect();
    let mut again = Command::new(command.get_program());
    again.args(args).current_dir(&node.home);
    if rustix::process::geteuid().is_root() {
        again.uid(NOBODY).gid(NOBODY);
    }
    up_refused_with(&node, again, 1, &["app.db", "write in its directory"]);
    mode(&node.home, 0o755);
    // And a state directory that cannot be made.
    let mut sealed = Node::new(dir.path(), "b", &["app.db"]);
    sealed.exec("app.db", SCHEMA);
    std::fs::write(sealed.state_dir(), "a file").unwrap();
    up_refused(&sealed, None, &["state", "--state-dir"]);
    sealed.kill();
}

#[test]
fn what_another_litemesh_runs_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["app.db"]);
    a.exec("app.db", SCHEMA);
    a.start(None);
    let mut other = Node::new(dir.path(), "b", &[]);
    other.databases = vec![a.file("app.db").to_str().unwrap().to_owned()];
    up_refused(&other, None, &["another litemesh replicates", "app.db", "stop it first"]);
    // The same state directory: other ports and another file do not help.
    let mut again = Node::new(dir.path(), "a", &["second.db"]);
    again.exec("second.db", SCHEMA);
    let before = std::fs::read(again.file("second.db")).unwrap();
    refused(again.up_command(None), 1, &["another litemesh runs with the state directory", "--state-dir"]);
    assert_eq!(std::fs::read(again.file("second.db")).unwrap(), before);
    again.process = None;
    a.exec("app.db", "INSERT INTO t VALUES('still here', 1)");
    a.sync();
    assert_eq!(a.status()["ready"], true);
}

/// A small file system of its own; gone with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, with the reason printed, where none can be mounted.
    fn mount(path: &Path, kib: u32) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let size = format!("size={kib}k");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(path).output();
        if mount.is_ok_and(|m| m.status.success()) {
            return Some(Self(path.to_owned()));
        }
        eprintln!("skipped: no file system can be mounted here (it takes root)");
        None
    }

    /// Leaves no room.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("filler")).unwrap();
        while std::io::Write::write_all(&mut file, &[7; 512]).is_ok() {}
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).output());
    }
}

#[test]
fn a_full_disk_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::new(dir.path(), "a", &["app.db"]);
    let Some(disk) = SmallDisk::mount(&node.file("data"), 256) else { return };
    node.databases = vec!["data/app.db".into()];
    node.exec("data/app.db", SCHEMA);
    let rows = dump(&node.file("data/app.db"));
    disk.fill();
    up_refused(&node, None, &["data/app.db", "the disk is full", "make room"]);
    std::fs::remove_file(node.file("data/filler")).unwrap();
    assert_eq!(dump(&node.file("data/app.db")), rows);
    let ours = "SELECT count(*) FROM sqlite_schema WHERE name LIKE '%litemesh%'";
    assert_eq!(node.app("data/app.db").query_row(ours, [], |r| r.get(0)), Ok(0));
    // With room again, the same line starts it.
    node.start(None);
    node.exec("data/app.db", "INSERT INTO t VALUES('after', 1)");
    node.stop();
    drop(disk);
}

#[test]
fn a_state_directory_on_a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(dir.path(), "a", &["app.db"]);
    node.exec("app.db", SCHEMA);
    let Some(disk) = SmallDisk::mount(&node.state_dir(), 512) else { return };
    disk.fill();
    up_refused(&node, None, &["state", "No space left"]);
    drop(disk);
}
