//! A TLS proxy in front of a server that was built without TLS.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener as StdListener};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Accepts TLS on one port of 127.0.0.1 and forwards it to another, in both directions. Its thread
/// runs until the test process ends, which is harmless: it only waits for connections.
pub(crate) fn carry(from: u16, to: u16, certificate: &Path, key: &Path, clients_of: Option<&Path>) {
    let config = Arc::new(config(certificate, key, clients_of));
    let listener = StdListener::bind((Ipv4Addr::LOCALHOST, from)).expect("a port for TLS");
    listener.set_nonblocking(true).expect("a listener");
    let serve = async move {
        let listener = TcpListener::from_std(listener).expect("a listener");
        while let Ok((client, _)) = listener.accept().await {
            let config = Arc::clone(&config);
            tokio::spawn(async move {
                // Ignore errors: the client sees them.
                drop(carry_one(client, config, to).await);
            });
        }
    };
    thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(serve);
    });
}

fn certificates(path: &Path) -> Vec<CertificateDer<'static>> {
    let pem = fs::read(path).expect("read a certificate");
    CertificateDer::pem_slice_iter(&pem)
        .map(|certificate| certificate.expect("PEM"))
        .collect()
}

fn config(certificate: &Path, key: &Path, clients_of: Option<&Path>) -> ServerConfig {
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("versions");
    let builder = match clients_of {
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(authority) {
                roots.add(certificate).expect("an authority");
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build();
            builder.with_client_cert_verifier(verifier.expect("a verifier"))
        }
        None => builder.with_no_client_auth(),
    };
    let key = PrivateKeyDer::from_pem_slice(&fs::read(key).expect("read a key")).expect("a key");
    builder
        .with_single_cert(certificates(certificate), key)
        .expect("a certificate with its key")
}

async fn carry_one(mut client: TcpStream, config: Arc<ServerConfig>, to: u16) -> io::Result<()> {
    let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await?;
    let (mut from_client, mut from_server) = (vec![0; 16 << 10], vec![0; 16 << 10]);
    loop {
        tokio::select! {
            count = client.read(&mut from_client) => {
                let mut rest = &from_client[..count?];
                if rest.is_empty() {
                    return Ok(());
                }
                while !rest.is_empty() {
                    tls.read_tls(&mut rest)?;
                    let state = tls.process_new_packets();
                    // If that failed, this sends the TLS alert to the client.
                    flush(&mut tls, &mut client).await?;
                    state.map_err(io::Error::other)?;
                    let mut plain = Vec::new();
                    match tls.reader().read_to_end(&mut plain) {
                        Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
                        _ => server.write_all(&plain).await?,
                    }
                }
            }
            count = server.read(&mut from_server) => {
                let said = &from_server[..count?];
                if said.is_empty() {
                    return Ok(());
                }
                tls.writer().write_all(said)?;
                flush(&mut tls, &mut client).await?;
            }
        }
    }
}

async fn flush(tls: &mut ServerConnection, client: &mut TcpStream) -> io::Result<()> {
    let mut bytes = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut bytes)?;
    }
    client.write_all(&bytes).await
}
