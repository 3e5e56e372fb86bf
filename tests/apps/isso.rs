//! Isso on two nodes, each with its own file: comments, edits, likes and deletions made at one are served by the other.
//!
//! Its comments have assigned integer ids. Two comments made on both sides *while the nodes are apart* get the same id,
//! and one of them is kept as a conflict; so here only one side is commented on while the other is away.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Node, free_addresses, litemesh, wait_equal, wait_for};

const VERSION: &str = "isso==0.14.0";
const PAGE: &str = "/?uri=%2Fguide%2F";

/// The program, installed once under the build's directory.
fn installed() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(VERSION.replace("==", "-"));
    let program = dir.join("bin/isso");
    let done = dir.join("installed");
    if done.exists() {
        return Some(program);
    }
    let run = |command: &mut Command| match command.output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            eprintln!("skipped, Isso cannot be installed: {}", String::from_utf8_lossy(&output.stderr));
            false
        }
        Err(e) => {
            eprintln!("skipped, Isso cannot be installed: {e}");
            false
        }
    };
    let pip = ["install", "--quiet", "--disable-pip-version-check", VERSION];
    let ok = run(Command::new("python3").args(["-m", "venv"]).arg(&dir))
        && run(Command::new(dir.join("bin/pip")).args(pip));
    ok.then(|| std::fs::write(done, VERSION).unwrap())?;
    Some(program)
}

/// Isso at work; it is stopped when dropped.
struct Isso {
    process: Child,
    address: SocketAddr,
}

impl Drop for Isso {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

impl Isso {
    /// Starts it on the file `comments.db` in `home`, and waits until it answers.
    fn start(program: &Path, home: &Path) -> Self {
        let address = free_addresses(1)[0];
        let config = format!(
            "[general]\ndbpath = {}\nhost = http://localhost:8080/\n[moderation]\nenabled = false\n\
             [guard]\nenabled = false\n[server]\nlisten = http://{address}/\ntrusted-proxies = 127.0.0.1\n",
            home.join("comments.db").display()
        );
        std::fs::write(home.join("isso.cfg"), config).unwrap();
        let log = std::fs::File::create(home.join("isso.log")).unwrap();
        let process = Command::new(program)
            .arg("-c")
            .arg(home.join("isso.cfg"))
            .arg("run")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let isso = Self { process, address };
        wait_for("Isso answers", || isso.ask("GET", PAGE, None, None).is_some());
        isso
    }

    /// A request as a browser on the site would send it; the body of the answer and the cookie that it sets.
    fn ask(
        &self,
        method: &str,
        path: &str,
        body: Option<Value>,
        cookie: Option<&str>,
    ) -> Option<(u16, String, String)> {
        let url = format!("http://{}{path}", self.address);
        let agent: ureq::Agent =
            ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build().into();
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(url)
            .header("origin", "http://localhost:8080")
            .header("referer", "http://localhost:8080/guide/")
            .header("content-type", "application/json")
            // A reader may like what was written elsewhere.
            .header("x-forwarded-for", if path.ends_with("/like") { "10.1.2.3" } else { "10.9.8.7" });
        if let Some(cookie) = cookie {
            request = request.header("cookie", cookie);
        }
        let body = body.map(|b| b.to_string()).unwrap_or_default();
        let mut answer = agent.run(request.body(body).unwrap()).ok()?;
        let set = answer.headers().get("set-cookie").and_then(|c| c.to_str().ok()).unwrap_or_default();
        let cookie = set.split(';').next().unwrap_or_default().to_owned();
        let text = answer.body_mut().read_to_string().ok()?;
        Some((answer.status().as_u16(), text, cookie))
    }

    /// Posts a comment; its id, and the cookie with which its author may change it.
    fn comment(&self, text: &str) -> (i64, String) {
        let body = json!({"title": "A guide", "text": text, "author": "Reader"});
        let (code, answer, cookie) = self.ask("POST", "/new?uri=%2Fguide%2F", Some(body), None).unwrap();
        assert_eq!(code, 201, "{answer}");
        (serde_json::from_str::<Value>(&answer).unwrap()["id"].as_i64().unwrap(), cookie)
    }

    /// The comments that a reader of the page sees.
    fn served(&self) -> Vec<Value> {
        let (code, answer, _) = self.ask("GET", PAGE, None, None).unwrap();
        assert!(code == 200 || code == 404, "{code}: {answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
        answer["replies"].as_array().cloned().unwrap_or_default()
    }

    fn serves(&self, text: &str) -> bool {
        self.served().iter().any(|c| c["text"].as_str().is_some_and(|t| t.contains(text)))
    }
}

#[test]
fn comments_made_at_either_node_are_served_by_both() {
    let Some(program) = installed() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut a = Node::new(dir.path(), "a", &["comments.db"]);
    let mut b = Node::new(dir.path(), "b", &["comments.db"]);
    // Isso makes its file; litemesh takes it in while Isso runs.
    let at_a = Isso::start(&program, &a.home);
    a.start(None);
    b.start(Some(&a.token()));
    let at_b = Isso::start(&program, &b.home);

    let (first, author) = at_a.comment("Greetings from a");
    wait_for("a's comment is served by b", || at_b.serves("Greetings from a"));
    let (second, _) = at_b.comment("Greetings from b");
    wait_for("b's comment is served by a", || at_a.serves("Greetings from b"));
    assert_ne!(first, second);

    // Its author may edit at b what was written at a: the signing key is in the database.
    let edit = json!({"text": "Edited at b", "author": "Reader"});
    let (code, answer, edited) = at_b.ask("PUT", &format!("/id/{first}"), Some(edit), Some(&author)).unwrap();
    assert_eq!(code, 200, "{answer}");
    wait_for("the edit is served by a", || at_a.serves("Edited at b") && !at_a.serves("from a"));
    let (code, answer, _) = at_a.ask("POST", &format!("/id/{second}/like"), Some(json!({})), None).unwrap();
    assert_eq!(code, 200, "{answer}");
    wait_for("the like is counted at b", || {
        at_b.served().iter().any(|c| c["id"] == second && c["likes"] == 1)
    });
    let (code, answer, _) = at_a.ask("DELETE", &format!("/id/{first}"), None, Some(&edited)).unwrap();
    assert_eq!(code, 200, "{answer}");
    wait_for("the deletion is seen at b", || !at_b.serves("Edited at b"));
    assert!(at_a.serves("Greetings from b") && at_b.serves("Greetings from b"));

    // Without litemesh on b both go on; a is commented on, b only reads and likes.
    b.kill();
    at_a.comment("While b was away");
    let (code, ..) = at_b.ask("POST", &format!("/id/{second}/dislike"), Some(json!({})), None).unwrap();
    assert_eq!(code, 200, "Isso at b works without litemesh");
    b.start(None);
    wait_for("b serves what it missed", || at_b.serves("While b was away"));
    at_b.comment("And b is back");
    wait_for("a serves it", || at_a.serves("And b is back"));
    wait_equal(&[&a, &b], "comments.db");
    for node in [&a, &b] {
        let output =
            litemesh().current_dir(&node.home).args(["conflicts", "list", "comments.db"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("no conflicts"), "{text}");
        let log = std::fs::read_to_string(node.home.join("isso.log")).unwrap();
        assert!(!log.contains("Traceback") && !log.contains("locked"), "{log}");
    }
}
