//! A host that follows its documents, and all that it is told.

use std::{
    sync::mpsc::{self, Receiver},
    thread::{self, JoinHandle},
    time::Instant,
};

use filter_agent::{
    etcd,
    fleet::{Answer, Found, News, Settings, Value},
};
use filter_tests::net::{Namespace, PATIENCE, run_in};
use tokio::sync::{oneshot, watch};

use crate::etcd::Etcd;

/// Follows documents in a namespace, until it is dropped.
pub struct Follower {
    news: Receiver<News>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// One member of etcd, a host that follows `orders`, and the first answer. `name`: the test's.
pub fn followed(name: &str) -> (Etcd, Follower, Answer) {
    let etcd = Etcd::start(name);
    etcd.put("rules/orders", b"one");
    let follower = Follower::start(&etcd.host, etcd.settings(&["orders"]));
    let answer = follower.answer_with("orders", "one");
    (etcd, follower, answer)
}

impl Follower {
    pub fn start(namespace: &Namespace, settings: Settings) -> Self {
        let (send, news) = mpsc::channel();
        let (stop, stopped) = oneshot::channel();
        let name = namespace.name.clone();
        let thread = thread::spawn(move || {
            run_in(&name, || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(async {
                    let _following = etcd::follow(settings, watch::channel(None).1, move |news| {
                        let _ = send.send(news);
                    });
                    let _ = stopped.await;
                });
            });
        });
        Self {
            news,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub fn next(&self) -> News {
        self.next_by(Instant::now() + PATIENCE)
    }

    /// Periodic answers come for ever: who waits for a certain one does so for a bounded time.
    fn next_by(&self, deadline: Instant) -> News {
        let left = deadline.saturating_duration_since(Instant::now());
        self.news.recv_timeout(left).expect("it is told in time")
    }

    /// The next news are an answer.
    pub fn answer(&self) -> Answer {
        announced(self.next())
    }

    /// Answers only, until one holds this document.
    pub fn answer_with(&self, database: &str, text: &str) -> Answer {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = announced(self.next_by(deadline));
            if text_of(&answer, database) == Some(text) {
                return answer;
            }
        }
    }

    /// Why the connection is lost. Answers before it are passed over.
    pub fn lost(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let News::Lost(why) = self.next_by(deadline) {
                println!("{why}");
                assert!(!why.contains('\n'), "it is one line: {why}");
                return why;
            }
        }
    }

    /// As `answer_with`, and the connection may be lost any number of times before.
    pub fn found_again(&self, database: &str, text: &str) -> Answer {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let News::Answer { answer, .. } = self.next_by(deadline)
                && text_of(&answer, database) == Some(text)
            {
                return answer;
            }
        }
    }

    /// News that were told and not looked at yet.
    pub fn pending(&self) -> Vec<News> {
        self.news.try_iter().collect()
    }
}

fn announced(news: News) -> Answer {
    match news {
        News::Answer {
            answer, healed: 0, ..
        } => answer,
        other => panic!("an answer comes, not {other:?}"),
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().unwrap().join();
        if !thread::panicking() {
            ended.unwrap();
        }
    }
}

pub fn value<'a>(answer: &'a Answer, database: &str) -> &'a Value {
    match &answer.documents[database] {
        Found::Value(value) => value,
        other => panic!("{database} has a document: {other:?}"),
    }
}

pub fn text_of<'a>(answer: &'a Answer, database: &str) -> Option<&'a str> {
    match &answer.documents[database] {
        Found::Value(value) => std::str::from_utf8(&value.text).ok(),
        Found::Missing | Found::Unreadable(_) => None,
    }
}
