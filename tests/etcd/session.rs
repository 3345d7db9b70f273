//! Requests of root over one connection, as many and as fast as etcd takes them: `etcdctl` makes a connection for each.

use std::{fs, path::Path, time::Duration};

use etcd_client::{
    AuthClient, Certificate, Client, ConnectOptions, Error, Identity, Permission, TlsOptions,
    UserAddOptions,
};
use tokio::{runtime::Runtime, task::JoinSet};

use super::{Etcd, endpoint, own_keys};
use crate::net::Namespace;

/// Requests that are under way at once.
const AT_ONCE: usize = 32;
const TIMEOUT: Duration = Duration::from_secs(5);

pub struct Session<'a> {
    namespace: &'a Namespace,
    runtime: Runtime,
    client: Client,
}

impl Etcd {
    pub fn session(&self) -> Session<'_> {
        let read = |path: &Path| fs::read(path).unwrap();
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(read(&self.authority.file())))
            .identity(Identity::from_pem(
                read(&self.root.certificate),
                read(&self.root.key),
            ));
        let options = ConnectOptions::new().with_tls(tls).with_timeout(TIMEOUT);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let client = self
            .namespace
            .run(|| runtime.block_on(Client::connect([endpoint(0)], Some(options))));
        Session {
            namespace: &self.namespace,
            runtime,
            client: client.unwrap(),
        }
    }
}

impl Session<'_> {
    /// Writes a key below the agent's prefix. Returns the revision of the change.
    ///
    /// # Errors
    /// It may have been written all the same.
    pub fn put(&mut self, key: &str, value: &str) -> Result<i64, Error> {
        let key = format!("/filter-agent/v1/{key}");
        let Self {
            namespace,
            runtime,
            client,
        } = self;
        let put = client.put(key, value, None);
        let done = namespace.run(|| runtime.block_on(put))?;
        Ok(done.header().unwrap().revision())
    }

    /// Adds a user and a role for each host: it may read the era and a database's document, and write its own keys.
    pub fn add_hosts(&self, hosts: &[String], database: &str) {
        let readable = ["era".to_owned(), format!("rules/{database}")];
        let readable = readable.map(|key| format!("/filter-agent/v1/{key}"));
        let Self {
            namespace,
            runtime,
            client,
        } = self;
        let add_all = async {
            let mut adding = JoinSet::new();
            for host in hosts {
                if adding.len() == AT_ONCE {
                    adding.join_next().await.unwrap().unwrap();
                }
                let auth = client.auth_client();
                adding.spawn(add_host(auth, host.clone(), readable.clone()));
            }
            adding.join_all().await;
        };
        namespace.run(|| runtime.block_on(add_all));
    }
}

async fn add_host(mut auth: AuthClient, host: String, readable: [String; 2]) {
    let host = host.as_str();
    let no_password = UserAddOptions::new().with_no_pwd();
    auth.user_add(host, "", Some(no_password)).await.unwrap();
    auth.role_add(host).await.unwrap();
    let own = own_keys(host).map(Permission::read_write);
    for permission in readable.map(Permission::read).into_iter().chain(own) {
        let granted = auth.role_grant_permission(host, permission).await;
        granted.unwrap();
    }
    auth.user_grant_role(host, host).await.unwrap();
}
