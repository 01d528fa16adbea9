// The public HTTP API, and nothing else.

const KEY = "foretaste-token";

export class ApiError extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

// Asks for a token when the server requires one; app.js sets it.
let askForToken = async () => "";
export const onTokenWanted = (ask) => { askForToken = ask; };

let asking = null;
const newToken = () => {
  asking ??= askForToken().then((token) => {
    sessionStorage.setItem(KEY, token);
    asking = null;
  });
  return asking;
};

export async function call(method, path, body) {
  for (;;) {
    const token = sessionStorage.getItem(KEY);
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, {
        method, headers, body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch {
      throw new ApiError(0, "The server does not answer. Is it still running?");
    }
    if (response.status === 401) {
      await newToken();
      continue;
    }
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw new ApiError(response.status, answer.error ?? `HTTP ${response.status}`);
    return answer;
  }
}

const part = encodeURIComponent;
export const recommend = (asked) => call("POST", "/v1/recommend", asked);
export const similar = (itemId, k) => call("GET", `/v1/items/${part(itemId)}/similar?k=${k}`);
export const findItems = (query, limit) => call("GET", `/v1/items?query=${part(query)}&limit=${limit}`);
export const findUsers = (prefix, limit) => call("GET", `/v1/users?prefix=${part(prefix)}&limit=${limit}`);
export const history = (userId, limit) => call("GET", `/v1/users/${part(userId)}/history?limit=${limit}`);
export const columns = () => call("GET", "/v1/columns");
export const model = () => call("GET", "/v1/model");
