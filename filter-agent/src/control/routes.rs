//! The routes, in one table, and the router that is made of it.

use axum::{
    Router,
    handler::Handler,
    http::Method,
    routing::{MethodRouter, get, post},
};

use super::{
    answers::{not_allowed, not_found},
    changes::{confirm, detach, plan, plan_text, refresh, reload, rollback, temporary},
    reads::{drops, events, explain, history, metrics, regions, rules, status},
    shared::Shared,
    trace::trace,
};

struct Route {
    method: Method,
    path: &'static str,
    answer: MethodRouter<Shared>,
}

/// Everything that is answered.
fn table() -> Vec<Route> {
    vec![
        // Where Prometheus looks.
        reads("/metrics", metrics),
        reads("/v1/metrics", metrics),
        reads("/v1/status", status),
        reads("/v1/rules", rules),
        reads("/v1/regions", regions),
        reads("/v1/explain", explain),
        reads("/v1/drops", drops),
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
    ]
}

fn reads<H: Handler<T, Shared>, T: 'static>(path: &'static str, answer: H) -> Route {
    Route {
        method: Method::GET,
        path,
        answer: get(answer),
    }
}

fn posts<H: Handler<T, Shared>, T: 'static>(path: &'static str, answer: H) -> Route {
    Route {
        method: Method::POST,
        path,
        answer: post(answer),
    }
}

/// The methods and paths that are answered, for whoever describes them.
pub fn listed() -> Vec<(Method, &'static str)> {
    let table = table().into_iter();
    table.map(|route| (route.method, route.path)).collect()
}

pub(super) fn router(shared: Shared) -> Router {
    table()
        .into_iter()
        .fold(Router::new(), |router, route| {
            router.route(route.path, route.answer)
        })
        .method_not_allowed_fallback(not_allowed)
        .fallback(not_found)
        .with_state(shared)
}
