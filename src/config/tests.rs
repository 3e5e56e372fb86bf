//! Tests of the configuration over real files. Invariant: each error is looked at as the user reads it.

use super::*;
use crate::config::raw::{ENV_PREFIX, KEYS};
use crate::core::schema::SchemaMode;

fn around(variables: &[(&str, &str)]) -> Surroundings {
    let variables = variables.iter().map(|(n, v)| (format!("{ENV_PREFIX}{n}").into(), v.into())).collect();
    Surroundings {
        variables,
        host_name: Some("db-1.example".into()),
        data_dir: Some("/data/litemesh".into()),
    }
}

fn raw(databases: &[&str]) -> Raw {
    let list: Vec<String> = databases.iter().map(|d| (*d).to_owned()).collect();
    Raw { databases: Some(list), ..Raw::default() }
}

fn refused(flags: Raw) -> String {
    let error = load(flags, None, &around(&[])).unwrap_err();
    assert_eq!(error.exit_code(), 78);
    error.to_string()
}

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn without_any_source_the_defaults_hold() {
    let config = load(Raw::default(), None, &around(&[])).unwrap();
    assert_eq!(config.cluster.to_string(), "0.0.0.0:6222");
    assert_eq!(config.client.to_string(), "127.0.0.1:4222");
    assert_eq!(config.http.to_string(), "127.0.0.1:8222");
    assert_eq!(config.name.as_str(), "db-1");
    assert_eq!(config.state_dir, Path::new("/data/litemesh"));
    assert_eq!((config.journal, config.log.as_str()), (Journal::Wal, "info,nats=warn,async_nats=warn"));
    assert!(config.databases.is_empty() && config.join.is_none() && config.advertise.is_none());
}

#[test]
fn a_flag_goes_over_the_environment_over_the_file_over_the_default() {
    let dir = tempfile::tempdir().unwrap();
    let text = "name = 'file'\nclient = '127.0.0.1:1'\nhttp = '127.0.0.1:2'\nstate_dir = 's'\njoin = 'lm1-f'";
    let file = write(dir.path(), "litemesh.toml", text);
    let around = around(&[
        ("NAME", "env"),
        ("CLIENT", "127.0.0.1:3"),
        ("JOIN_FILE", "/token"),
        ("SERVICE_HOST", "x"),
        ("LOG", ""),
    ]);
    let flags = Raw { name: Some("flag".into()), ..Raw::default() };
    let config = load(flags, Some(&file), &around).unwrap();
    assert_eq!(config.name.as_str(), "flag");
    assert_eq!(config.client.port(), 3);
    assert_eq!(config.http.port(), 2);
    assert_eq!(config.cluster.port(), 6222);
    assert_eq!(config.state_dir, dir.path().join("s"), "relative to the file");
    assert_eq!(config.join, Some(Join::File("/token".into())), "the environment's way wins over the file's");
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_known_one() {
    let dir = tempfile::tempdir().unwrap();
    for (key, near) in [("state-dir", "state_dir"), ("database", "databases"), ("htpp", "http")] {
        let file = write(dir.path(), "c.toml", &format!("{key} = 1"));
        let error = load(Raw::default(), Some(&file), &around(&[])).unwrap_err().to_string();
        assert!(error.contains(&format!("{key:?}")) && error.contains(&format!("{near:?}")), "{error}");
        assert!(error.contains("c.toml"), "{error}");
    }
}

#[test]
fn a_file_that_is_wrong_is_named_with_the_place() {
    let dir = tempfile::tempdir().unwrap();
    for (text, place) in [
        ("name = 'a'\njoin = lm1-secret", "c.toml, line 2"),
        ("databases = 'app.db'", "c.toml, line 1"),
        ("join = 'lm1-secret'\njoin_file = 'b'", "c.toml gives both"),
    ] {
        let file = write(dir.path(), "c.toml", text);
        let error = load(Raw::default(), Some(&file), &around(&[])).unwrap_err().to_string();
        assert!(error.contains(place) && !error.contains("secret"), "{error}");
    }
    let missing = dir.path().join("none.toml");
    assert!(matches!(
        load(Raw::default(), Some(&missing), &around(&[])),
        Err(ConfigError::Unreadable { .. })
    ));
}

#[test]
fn every_key_can_be_set_in_the_file_and_in_the_environment() {
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<&str> = KEYS.iter().copied().filter(|k| *k != "join_file").collect();
    let value = |key: &str| match key {
        "databases" => "['x.db']",
        "include" | "exclude" | "rekey" | "whole_row" | "by_column" => "['a*']",
        "cluster" => "'1.2.3.4:1'",
        "leaf_url" => "'tls://hub:7422'",
        "fabric_url" => "'nats://u:p@nats:4222'",
        "nats_memory" => "'128MiB'",
        "peers" => "['10.0.0.1:6222']",
        "client" | "http" => "'localhost:0'",
        "advertise" => "'[::1]:7'",
        "journal" => "'keep'",
        "verify_every" => "'1h'",
        "max_skew" => "'60s'",
        "conflicts_age" | "tombstones_age" | "absent_age" | "log_max_age" => "'30d'",
        "log_max_bytes" => "'64MiB'",
        "log_replicas" => "3",
        "conflicts_max" => "7",
        "merge" | "cdc" => "true",
        "schema" => "'manual'",
        "log" => "'warn,litemesh=debug'",
        _ => "'word'",
    };
    let text: String = all.iter().map(|k| format!("{k} = {}\n", value(k))).collect();
    let of_file = Raw::from_file(&write(dir.path(), "c.toml", &text)).unwrap();
    let plain = |key: &str| value(key).trim_matches(['[', ']', '\'']).to_owned();
    let variables: Vec<(OsString, OsString)> =
        all.iter().map(|k| (raw::variable(k).into(), plain(k).into())).collect();
    let of_environment = Raw::from_environment(&variables).unwrap();
    for raw in [&of_file, &of_environment] {
        assert!(raw.databases.is_some() && raw.include.is_some() && raw.exclude.is_some());
        assert!(raw.name.is_some() && raw.state_dir.is_some() && raw.join.is_some() && raw.log.is_some());
        assert!(raw.cluster.is_some() && raw.client.is_some() && raw.http.is_some());
        assert!(raw.advertise.is_some() && raw.journal.is_some() && raw.schema.is_some());
        assert!(raw.peers.is_some() && raw.key_file.is_some() && raw.cdc == Some(true));
        assert!(raw.leaf_url.is_some() && raw.leaf_credentials.is_some() && raw.leaf_ca.is_some());
        assert!(raw.fabric_url.is_some() && raw.fabric_credentials.is_some() && raw.fabric_ca.is_some());
        assert!(raw.fabric_cert.is_some() && raw.fabric_key.is_some() && raw.fabric_mesh.is_some());
        assert!(raw.nats_memory.is_some());
        assert!(raw.rekey.is_some() && raw.whole_row.is_some() && raw.by_column.is_some());
        assert!(raw.conflicts_age.is_some() && raw.conflicts_max.is_some());
        assert!(raw.log_max_bytes.is_some() && raw.log_max_age.is_some());
        assert!(raw.tombstones_age.is_some() && raw.absent_age.is_some() && raw.merge == Some(true));
    }
    // Those of another NATS system leave no room for a server's.
    let together = load(of_file.clone(), None, &around(&[])).unwrap_err().to_string();
    assert!(together.contains("with fabric_url"), "{together}");
    let none = (None, None, None, None, None, None);
    let mut of_file = of_file;
    (
        of_file.fabric_url,
        of_file.fabric_credentials,
        of_file.fabric_ca,
        of_file.fabric_cert,
        of_file.fabric_key,
        of_file.fabric_mesh,
    ) = none;
    let config = load(of_file, None, &around(&[])).unwrap();
    assert_eq!(config.nats_memory_mib, 128);
    assert_eq!(config.advertise.unwrap().to_string(), "[::1]:7");
    assert_eq!((config.journal, config.schema), (Journal::Keep, SchemaMode::Manual));
    assert_eq!((config.log_max_bytes, config.log_max_age.as_secs()), (64 << 20, 30 * 86_400));
    assert_eq!(config.log_replicas, Some(3));
    assert!(config.tables.covers("b") == config.tables.covers("Ab"));
}

#[test]
fn secrets_are_never_printed() {
    let flags = Raw { join: Some("lm1-secret".into()), ..Raw::default() };
    assert!(!format!("{flags:?}").contains("lm1-secret"));
    let config = load(flags, None, &around(&[])).unwrap();
    assert!(!format!("{config:?}").contains("lm1-secret"));
    assert_eq!(config.join.unwrap().token().unwrap(), "lm1-secret");
}

#[test]
fn a_token_file_that_does_not_help_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let empty = Join::File(write(dir.path(), "empty", " \n"));
    assert!(empty.token().unwrap_err().to_string().contains("is empty"));
    assert!(Join::File(dir.path().join("none")).token().unwrap_err().to_string().contains("cannot be read"));
    assert_eq!(Join::File(write(dir.path(), "t", "lm1-x\n")).token().unwrap(), "lm1-x");
}

#[test]
fn listeners_are_checked() {
    let with = |http: &str, client: &str, advertise: &str| Raw {
        http: Some(http.into()),
        client: Some(client.into()),
        advertise: Some(advertise.into()),
        ..Raw::default()
    };
    assert!(load(with("[::1]:1", "localhost:2", "db1:6222"), None, &around(&[])).is_ok());
    assert!(refused(with("0.0.0.0:1", "localhost:2", "a:1")).contains("--http"));
    assert!(refused(with("127.0.0.1:1", "10.0.0.1:2", "a:1")).contains("LITEMESH_CLIENT"));
    assert!(refused(with("8222", "127.0.0.1:2", "a:1")).contains("an address and a port"));
    assert!(refused(with("127.0.0.1:6222", "127.0.0.1:2", "a:1")).contains("cluster and http both"));
    for wrong in ["db1", "db1:0", ":6222", "2001:db8::1:6222", "0.0.0.0:6222", "a b:1", "[x]:1"] {
        assert!(refused(with("127.0.0.1:1", "127.0.0.1:2", wrong)).contains("--advertise"), "{wrong}");
    }
}

#[test]
fn words_that_mean_nothing_are_refused() {
    assert!(refused(Raw { log: Some("verbose".into()), ..Raw::default() }).contains("did you mean"));
    assert!(refused(Raw { journal: Some("off".into()), ..Raw::default() }).contains("\"keep\""));
    assert!(refused(Raw { schema: Some("auto".into()), ..Raw::default() }).contains("\"manual\""));
    assert!(refused(Raw { name: Some("a.b".into()), ..Raw::default() }).contains("'.'"));
    assert!(refused(Raw { include: Some(vec!["a[".into()]), ..Raw::default() }).contains("--include"));
    assert!(refused(Raw { join: Some(" ".into()), ..Raw::default() }).contains("missing"));
    let nameless = Surroundings { host_name: Some("日本".into()), ..around(&[]) };
    assert!(matches!(load(Raw::default(), None, &nameless), Err(ConfigError::HostName(_))));
    let homeless = Surroundings { data_dir: None, ..around(&[]) };
    assert!(matches!(load(Raw::default(), None, &homeless), Err(ConfigError::NoStateDir)));
}

#[test]
fn tables_are_chosen_by_globs() {
    let list = |l: &[&str]| Some(l.iter().map(|s| (*s).to_owned()).collect());
    let flags = Raw { include: list(&["app_*", "users"]), exclude: list(&["*_cache"]), ..Raw::default() };
    let tables = load(flags, None, &around(&[])).unwrap().tables;
    assert!(tables.covers("APP_orders") && tables.covers("users"));
    assert!(!tables.covers("app_page_cache") && !tables.covers("other"));
    assert!(TableFilter::default().covers("anything"));
    let rekey = load(Raw { rekey: list(&["order*"]), ..Raw::default() }, None, &around(&[])).unwrap().rekey;
    assert!(rekey.is_some_and(|r| r.covers("Orders") && !r.covers("users")));
    assert!(load(Raw::default(), None, &around(&[])).unwrap().rekey.is_none());
}

#[test]
fn databases_go_by_their_stem_or_the_name_given() {
    let dir = tempfile::tempdir().unwrap();
    let a = dir.path().join("a.db").display().to_string();
    let config =
        load(raw(&[&a, &format!("other={}/my app.v2.db", dir.path().display())]), None, &around(&[]));
    let names: Vec<String> = config.unwrap().databases.iter().map(|d| d.name.to_string()).collect();
    assert_eq!(names, ["a", "other"]);
    assert!(refused(raw(&["my app.db"])).contains("NAME=my app.db"));
    assert!(refused(raw(&["a b=x.db"])).contains("NAME=PATH"));
    assert!(refused(raw(&["a="])).contains("a path is missing"));
}

#[test]
fn globs_find_sqlite_files_only() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["one.db", "two.db"] {
        let conn = rusqlite::Connection::open(dir.path().join(name)).unwrap();
        conn.execute_batch("CREATE TABLE t(x)").unwrap();
    }
    write(dir.path(), "empty.db", "");
    write(dir.path(), "one.db-wal", "SQLite format 3\0");
    write(dir.path(), "notes.db", "not a database at all");
    write(dir.path(), "lock", "");
    std::fs::create_dir(dir.path().join("dir.db")).unwrap();
    let pattern = format!("{}/*", dir.path().display());
    let config = load(raw(&[&pattern]), None, &around(&[])).unwrap();
    let names: Vec<String> = config.databases.iter().map(|d| d.name.to_string()).collect();
    assert_eq!(names, ["empty", "one", "two"]);
    let none = format!("{}/*.sqlite", dir.path().display());
    assert!(refused(raw(&[&none])).contains("no SQLite file matches"));
}

#[test]
fn one_name_or_one_file_twice_is_refused_with_both_named() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.db"), dir.path().join("b"));
    std::fs::create_dir(&b).unwrap();
    let (a, b) = (a.display().to_string(), format!("{}/a.sqlite", b.display()));
    let error = refused(raw(&[&a, &b]));
    assert!(error.contains(&a) && error.contains(&b) && error.contains("\"a\""), "{error}");
    let again = format!("x={}/./a.db", dir.path().display());
    let error = refused(raw(&[&a, &again]));
    assert!(error.contains(&a) && error.contains("same file"), "{error}");
}

#[test]
fn a_log_that_could_hold_nothing_is_refused() {
    for (key, value) in
        [("log_max_bytes", "1MiB"), ("log_max_bytes", "7"), ("log_max_age", "0s"), ("log_max_age", "1")]
    {
        let mut raw = Raw::default();
        match key {
            "log_max_bytes" => raw.log_max_bytes = Some(value.to_owned()),
            _ => raw.log_max_age = Some(value.to_owned()),
        }
        let why = load(raw, None, &around(&[])).unwrap_err().to_string();
        assert!(why.contains(value), "{why}");
    }
}

#[test]
fn another_nats_system_may_be_a_table_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let text = "[fabric]\nurl = 'tls://nats.example'\nca = 'ca.pem'\nmesh = 'shop'\n";
    let file = write(dir.path(), "c.toml", text);
    let found = load(raw(&["x.db"]), Some(&file), &around(&[])).unwrap().external.unwrap();
    assert_eq!((found.servers[0].as_str(), found.mesh.as_str()), ("tls://nats.example:4222", "shop"));
    assert_eq!(found.ca, Some(dir.path().join("ca.pem")));
    let file = write(dir.path(), "d.toml", "[fabric]\nulr = 'tls://nats.example'\n");
    let text = load(raw(&["x.db"]), Some(&file), &around(&[])).unwrap_err().to_string();
    assert!(text.contains("\"fabric.ulr\"") && text.contains("\"fabric.url\""), "{text}");
    let little = load(Raw { nats_memory: Some("8MiB".into()), ..raw(&[]) }, None, &around(&[]));
    assert!(little.unwrap_err().to_string().contains("the least is 32MiB"));
}
