//! The connection that tells our server it is not alone. A clustered nats-server that sees no other server at all
//! does not start its consensus groups, and so does not even load the streams that have one copy, here. Any leafnode
//! connection ends that wait. Invariant: it is bound to an account that has nothing in it, and is made again for as
//! long as the server may run.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tracing::debug;

use super::accounts::{GATE_USER, Password};

/// A lone server serves nothing until the gate is open: try often. On loopback a refused dial costs nothing.
const RETRY: Duration = Duration::from_millis(25);
/// While the server is down for longer.
const RETRY_SLOW: Duration = Duration::from_millis(500);
const FAST_RETRIES: u32 = 200;
/// Longer than any INFO of a server.
const MAX_LINE: usize = 64 * 1024;

/// Holds the gate open until it is aborted.
pub async fn hold(address: SocketAddr, password: Password) {
    let mut failures = 0;
    loop {
        match connect(address, &password).await {
            Ok(stream) => {
                failures = 0;
                if let Err(e) = answer_pings(stream).await {
                    debug!("the gate closed: {e}");
                }
            }
            Err(_) => failures += 1,
        }
        tokio::time::sleep(if failures < FAST_RETRIES { RETRY } else { RETRY_SLOW }).await;
    }
}

async fn connect(address: SocketAddr, password: &Password) -> io::Result<BufReader<TcpStream>> {
    let mut stream = BufReader::new(TcpStream::connect(address).await?);
    let mut line = Vec::new();
    read_line(&mut stream, &mut line).await?;
    let options = serde_json::json!({
        "user": GATE_USER,
        "pass": password.reveal(),
        "name": "litemesh-gate",
        "version": nats_launcher::manifest::VERSION,
    });
    stream.write_all(format!("CONNECT {options}\r\nPING\r\n").as_bytes()).await?;
    Ok(stream)
}

async fn answer_pings(mut stream: BufReader<TcpStream>) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        read_line(&mut stream, &mut line).await?;
        if line.starts_with(b"PING") {
            stream.write_all(b"PONG\r\n").await?;
        } else if line.starts_with(b"-ERR") {
            return Err(io::Error::other(String::from_utf8_lossy(&line).trim().to_owned()));
        }
    }
}

async fn read_line(stream: &mut BufReader<TcpStream>, line: &mut Vec<u8>) -> io::Result<()> {
    use tokio::io::AsyncReadExt;
    line.clear();
    let read = stream.take(MAX_LINE as u64).read_until(b'\n', line).await?;
    if read == 0 || line.last() != Some(&b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}
