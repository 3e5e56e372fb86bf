//! Runs the server with the arguments given until it is killed: what the tests kill to see that no server is left.

use std::time::Duration;

use nats_launcher::{Backoff, Bundle, READY, ServerEvent, ServerSpec, Supervisor};

fn main() {
    let mut args = std::env::args_os().skip(1);
    let dir = args.next().expect("usage: hold DIR [SERVER-ARGUMENT]..");
    let binary = Bundle::install(dir.as_ref()).expect("a server");
    let spec = ServerSpec {
        name: "hold".to_owned(),
        binary,
        args: args.collect(),
        memory_limit_mib: None,
        ready_when: vec![READY],
        hushed: Vec::new(),
        overheard: Vec::new(),
        grace: Duration::from_secs(5),
        backoff: Backoff::default(),
    };
    let supervisor = Supervisor::start(spec, |event| {
        if let ServerEvent::Ready { pid } = event {
            println!("{pid}");
        }
    });
    // For ever: the test kills this process.
    std::thread::park();
    drop(supervisor);
}
