// Numbers as people read them. null and undefined become an en dash.

const NONE = "–";

export function count(n) {
  if (n == null) return NONE;
  if (Math.abs(n) < 10000) return Math.round(n).toLocaleString("en");
  if (Math.abs(n) < 1e6) return (n / 1e3).toFixed(n < 1e5 ? 1 : 0) + "k";
  return (n / 1e6).toFixed(n < 1e7 ? 2 : 1) + "M";
}

export function rate(n) {
  if (n == null) return NONE;
  return n > 0 && n < 100 ? n.toFixed(1) : count(n);
}

export function scientific(n) {
  if (n == null) return NONE;
  return n === 0 ? "0" : n.toExponential(1).replace("e-", "e−").replace("e+", "e").replace(".0e", "e");
}

export function left(s) {
  if (s == null || s < 0) return "";
  if (s < 60) return `${Math.max(1, Math.round(s))} s left`;
  if (s < 5400) return `${Math.round(s / 60)} min left`;
  return `${(s / 3600).toFixed(1)} h left`;
}

export function percent(part, whole) {
  if (!whole) return NONE;
  const value = (100 * part) / whole;
  return (value > 0 && value < 10 ? value.toFixed(1) : value.toFixed(0)) + " %";
}

export function seconds(s) {
  if (s == null) return NONE;
  if (s < 0.01) return (1000 * s).toFixed(1) + " ms";
  if (s < 1) return (1000 * s).toFixed(0) + " ms";
  return s < 100 ? s.toFixed(2) + " s" : s.toFixed(0) + " s";
}

export function ago(s) {
  if (s == null) return NONE;
  if (s < 1) return "now";
  if (s < 60) return Math.floor(s) + " s ago";
  if (s < 3600) return Math.floor(s / 60) + " min ago";
  return Math.floor(s / 3600) + " h ago";
}

export function uptime(s) {
  if (s == null) return "";
  const days = Math.floor(s / 86400);
  const hours = Math.floor((s % 86400) / 3600);
  const minutes = Math.floor((s % 3600) / 60);
  if (days) return `up ${days} d ${hours} h`;
  if (hours) return `up ${hours} h ${minutes} min`;
  return minutes ? `up ${minutes} min` : `up ${Math.floor(s)} s`;
}

export function parameters(n) {
  if (n == null) return "";
  return n >= 1e9 ? (n / 1e9).toFixed(1) + "B parameters" : (n / 1e6).toFixed(n < 1e7 ? 1 : 0) + "M parameters";
}

// A token as it can be read: white space made visible.
export function visible(text) {
  return text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
}
