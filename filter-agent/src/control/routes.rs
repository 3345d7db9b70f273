//! The routes, in one table, and the router that is made of it.

use std::collections::BTreeSet;

use axum::{
    Router,
    handler::Handler,
    http::Method,
    routing::{MethodRouter, any, delete, get, patch, post},
};

use super::{
    answers::{not_allowed, not_found, only_root},
    changes::{confirm, detach, plan, plan_text, refresh, reload, rollback, temporary},
    firewall::{amend, create, list, managed_ranges, one, remove},
    reads::{drops, events, explain, history, metrics, regions, rules, status},
    shared::Shared,
    trace::trace,
};

const RULES: &str = "/v1/databases/{database}/firewall_rules";
const RULE: &str = "/v1/databases/{database}/firewall_rules/{id}";

struct Route {
    method: Method,
    path: &'static str,
    answer: MethodRouter<Shared>,
    is_for_group: bool,
}

impl Route {
    /// Members of the group of the status socket may ask, too. Its answer holds no secret, no text of a policy and
    /// nothing of what root does.
    fn for_group(self) -> Self {
        Self {
            is_for_group: true,
            ..self
        }
    }
}

/// Who asks.
#[derive(Clone, Copy)]
pub(super) enum Audience {
    Root,
    Group,
}

/// Everything that is answered.
fn table() -> Vec<Route> {
    vec![
        // Where Prometheus looks.
        reads("/metrics", metrics).for_group(),
        reads("/v1/metrics", metrics).for_group(),
        reads("/v1/status", status).for_group(),
        reads("/v1/rules", rules).for_group(),
        reads("/v1/regions", regions).for_group(),
        reads("/v1/explain", explain).for_group(),
        reads("/v1/drops", drops).for_group(),
        reads("/v1/events", events),
        reads("/v1/history", history),
        reads("/v1/plan", plan),
        posts("/v1/plan", plan_text),
        posts("/v1/trace", trace),
        posts("/v1/reload", reload),
        posts("/v1/confirm", confirm),
        posts("/v1/rollback", rollback),
        posts("/v1/refresh", refresh),
        posts("/v1/temporary", temporary),
        posts("/v1/detach", detach),
        reads("/v1/firewall/managed_ranges", managed_ranges).for_group(),
        reads(RULES, list).for_group(),
        posts(RULES, create),
        reads(RULE, one).for_group(),
        patches(RULE, amend),
        deletes(RULE, remove),
    ]
}

fn reads<H: Handler<T, Shared>, T: 'static>(path: &'static str, answer: H) -> Route {
    route(Method::GET, path, get(answer))
}

fn posts<H: Handler<T, Shared>, T: 'static>(path: &'static str, answer: H) -> Route {
    route(Method::POST, path, post(answer))
}

fn patches<H: Handler<T, Shared>, T: 'static>(path: &'static str, answer: H) -> Route {
    route(Method::PATCH, path, patch(answer))
}

fn deletes<H: Handler<T, Shared>, T: 'static>(path: &'static str, answer: H) -> Route {
    route(Method::DELETE, path, delete(answer))
}

fn route(method: Method, path: &'static str, answer: MethodRouter<Shared>) -> Route {
    Route {
        method,
        path,
        answer,
        is_for_group: false,
    }
}

/// A route as it is described.
#[derive(Debug, PartialEq)]
pub struct Listed {
    pub method: Method,
    pub path: &'static str,
    /// Whether the status socket answers it.
    pub is_for_group: bool,
}

/// What is answered, for whoever describes it.
pub fn listed() -> Vec<Listed> {
    let table = table().into_iter();
    table
        .map(|route| Listed {
            method: route.method,
            path: route.path,
            is_for_group: route.is_for_group,
        })
        .collect()
}

pub(super) fn router(shared: Shared, audience: Audience) -> Router {
    let mut router = Router::new();
    let mut of_root = BTreeSet::new();
    for route in table() {
        match audience {
            Audience::Group if !route.is_for_group => {
                of_root.insert(route.path);
            }
            Audience::Root | Audience::Group => router = router.route(route.path, route.answer),
        }
    }
    let listed = listed();
    let is_shared = |path: &&str| listed.iter().any(|r| r.is_for_group && r.path == *path);
    for path in of_root.into_iter().filter(|path| !is_shared(path)) {
        router = router.route(path, any(only_root));
    }
    router
        .method_not_allowed_fallback(not_allowed)
        .fallback(not_found)
        .with_state(shared)
}
