{{- define "resumed.name" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "resumed.selector" -}}
app.kubernetes.io/name: resumed
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Of every object. */}}
{{- define "resumed.metadata" -}}
name: {{ include "resumed.name" . }}
labels:
  {{- include "resumed.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .Release.Service }}
  helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "resumed.tlsSecret" -}}
{{- .Values.tls.secret | default (printf "%s-tls" (include "resumed.name" .)) -}}
{{- end -}}

{{/* What the server is told, as environment variables: by name, value. */}}
{{- define "resumed.settings" -}}
{{- $listen := .Values.server.listen -}}
RESUMED_LISTEN: {{ printf "%s:7400" $listen | quote }}
RESUMED_HEALTH_LISTEN: {{ printf "%s:7401" $listen | quote }}
{{- if .Values.metrics.enabled }}
RESUMED_METRICS_LISTEN: {{ printf "%s:9464" $listen | quote }}
{{- end }}
{{- if eq .Values.engine "embedded" }}
RESUMED_STORAGE: lmdb:///var/lib/resumed
RESUMED_CAPACITY: {{ .Values.embedded.capacity | quote }}
{{- else }}
RESUMED_STORAGE: {{ .Values.redis.url | quote }}
{{- end }}
RESUMED_MAX_TTL: {{ .Values.server.maxTtl | quote }}
RESUMED_WORKERS: {{ .Values.server.workers | quote }}
RESUMED_THREADS: {{ .Values.server.threads | quote }}
RESUMED_SHUTDOWN_DELAY: {{ printf "%ds" (int .Values.server.shutdownDelaySeconds) | quote }}
RESUMED_MAX_CONNECTION_AGE: {{ .Values.server.maxConnectionAge | quote }}
RESUMED_MAX_CONNECTIONS: {{ int .Values.server.maxConnections | quote }}
RESUMED_NAMESPACE_OPS_PER_SECOND: {{ int .Values.namespaceLimits.opsPerSecond | quote }}
RESUMED_NAMESPACE_SESSIONS: {{ int .Values.namespaceLimits.sessions | quote }}
RESUMED_NAMESPACE_BYTES: {{ .Values.namespaceLimits.bytes | quote }}
RESUMED_NAMESPACE_WATCHERS: {{ int .Values.namespaceLimits.watchers | quote }}
RESUMED_LOG_LEVEL: {{ .Values.server.logLevel | quote }}
{{- if .Values.tls.enabled }}
RESUMED_TLS_CERT: /etc/resumed/tls/tls.crt
RESUMED_TLS_KEY: /etc/resumed/tls/tls.key
RESUMED_CLIENT_CA: /etc/resumed/{{ if .Values.tls.clientCASecret }}client-ca{{ else }}tls{{ end }}/ca.crt
{{- else }}
RESUMED_INSECURE: "true"
{{- end }}
{{- if .Values.grants }}
RESUMED_GRANTS: /etc/resumed/grants/grants.toml
{{- end }}
{{- end -}}

{{/* What is mounted, always as a directory: a file alone would not be updated. By name: where, and the volume. */}}
{{- define "resumed.volumes" -}}
{{- if .Values.tls.enabled }}
tls:
  path: /etc/resumed/tls
  volume: {secret: {secretName: {{ include "resumed.tlsSecret" . }}, defaultMode: 0440}}
{{- if .Values.tls.clientCASecret }}
client-ca:
  path: /etc/resumed/client-ca
  volume: {secret: {secretName: {{ .Values.tls.clientCASecret }}, defaultMode: 0440}}
{{- end }}
{{- end }}
{{- if .Values.grants }}
grants:
  path: /etc/resumed/grants
  volume: {configMap: {name: {{ include "resumed.name" . }}}}
{{- end }}
{{- if and (eq .Values.engine "redis") .Values.redis.secret }}
redis:
  path: /etc/resumed/redis
  volume: {secret: {secretName: {{ .Values.redis.secret }}, defaultMode: 0440}}
{{- end }}
{{- if and (eq .Values.engine "embedded") (not .Values.embedded.persistence.size) }}
sessions:
  path: /var/lib/resumed
  writable: true
  volume: {emptyDir: {}}
{{- end }}
{{- end -}}
