//! Which engine it is.

use serde::Deserialize;

use crate::client::{Client, Method};
use crate::failure::{Failure, FailureKind};

/// Bytes of `http.max_content_length`, unless set otherwise.
pub const DEFAULT_MAX_CONTENT: usize = 100 * 1024 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    Elasticsearch,
    OpenSearch,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineInfo {
    pub product: Product,
    /// For instance "8.19.0".
    pub version: String,
    /// The largest request body taken, in bytes.
    pub max_content_length: usize,
}

impl Client {
    /// Asks what it speaks to.
    ///
    /// `GET /_nodes/_local/http` first: it knows max_content_length, does not lie about the version as OpenSearch's
    /// `GET /` may (compatibility.override_main_response_version), and a build of Elasticsearch for tests has no `GET /`.
    /// Hosted engines may forbid it: then `GET /`.
    pub fn info(&self) -> Result<EngineInfo, Failure> {
        let local = self.call(Method::Get, "/_nodes/_local/http", None)?;
        if local.status == 200 {
            return read_nodes(&local.body);
        }
        let refused = match local.success() {
            Ok(_) => Failure::new(FailureKind::BadAnswer, "no answer about the node"),
            Err(failure) => failure,
        };
        // Not when the credentials are wrong or the engine is overloaded: the second request would only fail likewise.
        if refused.status == Some(401)
            || refused.kind.is_transient()
                && refused.kind != FailureKind::Unauthorized
                && refused.kind != FailureKind::BadAnswer
        {
            return Err(refused);
        }
        let root = self.call(Method::Get, "/", None)?;
        if root.status == 200 { read_root(&root.body) } else { Err(refused) }
    }
}

fn read_nodes(body: &[u8]) -> Result<EngineInfo, Failure> {
    #[derive(Deserialize)]
    struct Nodes {
        nodes: std::collections::HashMap<String, Node>,
    }
    #[derive(Deserialize)]
    struct Node {
        version: String,
        build_flavor: Option<String>,
        http: Option<Http>,
    }
    #[derive(Deserialize)]
    struct Http {
        max_content_length_in_bytes: Option<usize>,
    }
    let nodes: Nodes = serde_json::from_slice(body).map_err(|error| bad_answer(&error))?;
    let node = nodes
        .nodes
        .into_values()
        .next()
        .ok_or_else(|| Failure::new(FailureKind::BadAnswer, "the engine names no node"))?;
    // Elasticsearch has told a flavour since 6.3; OpenSearch dropped it when it forked.
    let product = if node.build_flavor.is_some() { Product::Elasticsearch } else { Product::OpenSearch };
    let max_content_length = node.http.and_then(|http| http.max_content_length_in_bytes).unwrap_or(DEFAULT_MAX_CONTENT);
    engine_info(product, node.version, max_content_length)
}

fn read_root(body: &[u8]) -> Result<EngineInfo, Failure> {
    #[derive(Deserialize)]
    struct Root {
        version: Version,
        #[serde(default)]
        tagline: String,
    }
    #[derive(Deserialize)]
    struct Version {
        number: String,
        distribution: Option<String>,
    }
    let root: Root = serde_json::from_slice(body).map_err(|error| bad_answer(&error))?;
    let is_opensearch =
        root.version.distribution.as_deref() == Some("opensearch") || root.tagline.contains("OpenSearch");
    let product = if is_opensearch { Product::OpenSearch } else { Product::Elasticsearch };
    engine_info(product, root.version.number, DEFAULT_MAX_CONTENT)
}

fn engine_info(product: Product, version: String, max_content_length: usize) -> Result<EngineInfo, Failure> {
    if version.split('.').next().is_none_or(|major| major.parse::<u32>().is_err()) {
        return Err(Failure::new(FailureKind::BadAnswer, format!("\"{version}\" is not a version")));
    }
    Ok(EngineInfo { product, version, max_content_length })
}

fn bad_answer(error: &serde_json::Error) -> Failure {
    Failure::new(FailureKind::BadAnswer, format!("this is not Elasticsearch or OpenSearch: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Shortened, but word for word.
    const ELASTICSEARCH: &str = r#"{"_nodes":{"total":1,"successful":1,"failed":0},"cluster_name":"elasticsearch","nodes":{"wqXHuspWQiam4tcwD7TkYA":{"name":"vm","ip":"127.0.0.1","version":"8.19.0","transport_version":8841064,"build_flavor":"default","build_type":"zip","http":{"bound_address":["127.0.0.1:19200"],"max_content_length_in_bytes":104857600}}}}"#;
    const OPENSEARCH: &str = r#"{"_nodes":{"total":1,"successful":1,"failed":0},"cluster_name":"opensearch","nodes":{"q7mCF1S3QkeDnjp6Or4hgw":{"name":"vm","ip":"127.0.0.1","version":"2.19.1","build_type":"zip","http":{"bound_address":["127.0.0.1:19201"],"max_content_length_in_bytes":10485760}}}}"#;

    #[test]
    fn both_engines_are_told_apart_by_their_node() {
        let info = read_nodes(ELASTICSEARCH.as_bytes()).unwrap();
        assert_eq!(
            info,
            EngineInfo { product: Product::Elasticsearch, version: "8.19.0".into(), max_content_length: 104_857_600 }
        );
        let info = read_nodes(OPENSEARCH.as_bytes()).unwrap();
        assert_eq!(
            info,
            EngineInfo { product: Product::OpenSearch, version: "2.19.1".into(), max_content_length: 10_485_760 }
        );
    }

    #[test]
    fn both_engines_are_told_apart_by_their_root() {
        let opensearch = r#"{"name":"vm","version":{"distribution":"opensearch","number":"2.19.1"},"tagline":"The OpenSearch Project: https://opensearch.org/"}"#;
        assert_eq!(read_root(opensearch.as_bytes()).unwrap().product, Product::OpenSearch);
        let elasticsearch =
            r#"{"name":"vm","version":{"number":"8.19.0","build_flavor":"default"},"tagline":"You Know, for Search"}"#;
        assert_eq!(read_root(elasticsearch.as_bytes()).unwrap().product, Product::Elasticsearch);
        for other in ["", "<html>", "{}", r#"{"version":{"number":"x"}}"#] {
            assert_eq!(read_root(other.as_bytes()).unwrap_err().kind, FailureKind::BadAnswer);
        }
    }
}
